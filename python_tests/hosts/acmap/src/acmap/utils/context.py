"""Where a run of ACMap is in its tasks."""


class Context:
    def __init__(self, config, logger, class_order):
        self.config, self.logger, self.class_order = config, logger, class_order
        self.increments = [config.init_cls]
        while (left := len(class_order) - sum(self.increments)) > 0:
            self.increments.append(min(config.increment, left))
        self.cur_task, self.known_classes = 1, 0

    cur_task_size = property(lambda self: self.increments[self.cur_task - 1])
    total_classes = property(lambda self: self.known_classes + self.cur_task_size)
    is_first_task = property(lambda self: self.cur_task == 1)

    def next_task(self):
        self.known_classes, self.cur_task = self.total_classes, self.cur_task + 1
