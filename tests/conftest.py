"""What every test needs of its process."""

import signal

# A shell's background job starts with Ctrl-C ignored, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
