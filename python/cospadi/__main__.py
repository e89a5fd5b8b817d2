"""``python -m cospadi`` is the ``cospadi`` command, and tells C++ builds where its files are.

``python -m cospadi --cmake-dir`` and ``--include-dir`` print one folder each, ``--onnx-library`` the file that ONNX
Runtime loads. They are answered here, since a build system that asks should not wait for the command line's imports,
nor need them installed.
"""

from __future__ import annotations

import sys


def _main() -> int:
    places = {
        "--cmake-dir": "cmake_dir",
        "--include-dir": "include_dir",
        "--onnx-library": "onnx_library",
    }
    if len(sys.argv) == 2 and sys.argv[1] in places:
        from cospadi import sdk
        from cospadi.errors import CospadiError

        try:
            print(getattr(sdk, places[sys.argv[1]])())
        except CospadiError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        return 0
    from cospadi.cli.app import main

    main()
    return 0


if __name__ == "__main__":
    sys.exit(_main())
