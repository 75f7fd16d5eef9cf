"""Load a model, adapt it, wrap it as a policy, and hold its reference."""

import logging

# peft loads bitsandbytes wherever that is installed, which then says on the terminal that it lacks a kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
