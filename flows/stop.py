"""The one request to stop."""

import threading

STOP = threading.Event()
"""Set it, and what runs now stops resumably. Ctrl-C does, and cancelling the flow run."""
