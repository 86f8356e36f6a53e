"""Compile the C++ kernels into a directory; `loader.py` runs this text as a process of its own.

There `torch.utils.cpp_extension` may print, warn and change its environment as it likes, and what
it says comes back as one text. The one argument is JSON: {"directory", "sources", "flags"}.
"""

import json
import sys

from torch.utils.cpp_extension import load


def main(request: str) -> None:
    """Compile, link and load the library once, as a check, from `directory`/svp_cpu.so."""
    options = json.loads(request)
    load(
        name="svp_cpu",
        sources=options["sources"],
        extra_cflags=options["flags"],
        build_directory=options["directory"],
        is_python_module=False,
        verbose=False,
    )


if __name__ == "__main__":
    main(sys.argv[1])
