// Working memory that a thread keeps from call to call: fresh memory would cost a page fault for every 4 kB, more than
// the kernels that fill it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace plora::cpu {

class Pool {
 public:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };

  static Pool& of_this_thread() {
    static thread_local Pool pool;
    return pool;
  }

  // The smallest idle block that is large enough, else a new one.
  Block take(size_t bytes) {
    size_t best = idle_.size();
    for (size_t i = 0; i < idle_.size(); ++i)
      if (idle_[i].bytes >= bytes && (best == idle_.size() || idle_[i].bytes < idle_[best].bytes)) best = i;
    if (best == idle_.size()) return {::operator new(bytes, kAlign), bytes};
    const Block block = idle_[best];
    idle_[best] = idle_.back();
    idle_.pop_back();
    return block;
  }

  void give_back(Block block) {
    if (block.bytes > kMost || idle_.size() == kBlocks) return ::operator delete(block.data, kAlign);
    idle_.push_back(block);
  }

  ~Pool() {
    for (const Block& block : idle_) ::operator delete(block.data, kAlign);
  }

 private:
  static constexpr size_t kMost = size_t{16} << 20, kBlocks = 12;  // what a thread keeps: so much a block, so many
  static constexpr std::align_val_t kAlign{64};
  std::vector<Block> idle_;
};

// n elements, not initialised. Belongs to the thread that made it.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t n = 0) {
    if (n > 0) block_ = Pool::of_this_thread().take(static_cast<size_t>(n) * sizeof(T));
  }
  ~Scratch() {
    if (block_.data) Pool::of_this_thread().give_back(block_);
  }
  Scratch(Scratch&& other) noexcept : block_(std::exchange(other.block_, {})) {}
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }

  T* data() const { return static_cast<T*>(block_.data); }
  T& operator[](int64_t i) const { return data()[i]; }

  // At least n elements; what they held is lost where that takes another block.
  T* grown(int64_t n) {
    if (static_cast<size_t>(n) * sizeof(T) > block_.bytes) *this = Scratch(n);
    return data();
  }

 private:
  Pool::Block block_;
};

// Asks for large pages under an output that is about to be written for the first time.
inline void large_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kLarge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (end > begin && end - begin >= 16 * kLarge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace plora::cpu
