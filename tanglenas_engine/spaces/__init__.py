"""Search spaces, their architectures, and what these cost."""

from tanglenas_engine.spaces import cells as cells
