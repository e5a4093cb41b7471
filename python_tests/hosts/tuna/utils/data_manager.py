"""TUNA's data, which are PILOT's."""

import sys

from hosts.pilot.utils import data_manager

sys.modules[__name__] = data_manager
