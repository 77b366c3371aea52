# Generated into the frozen binary by recorder.py; it exists nowhere else.

from types import CodeType

# By `_guest_compile.key_of`.
CODES: dict[tuple[str, str], CodeType]
