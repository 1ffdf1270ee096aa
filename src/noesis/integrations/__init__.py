"""What noesis knows of other libraries; imported late, by nobody at import time."""
