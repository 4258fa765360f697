"""What runs in other processes. A worker is a module with functions `check_*`; see `running.py`."""
