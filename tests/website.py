"""The page in a process of its own, as `hfvram web` starts it, on a free port."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def website(home: Path, *args: str, **env: str) -> Iterator[str]:
    """Its address. Nothing is cached, and there is no network unless `env` says so."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HFVRAM_", "GRADIO_"))}
    clean |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | env
    code = "import sys; from hfvram.show.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "web", "--port", "0", "--no-browser", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean) as process:
        assert process.stderr
        try:
            said = process.stderr.readline()
            found = re.search(r"http://\S+", said)
            assert found, said + process.stderr.read()
            yield found[0]
        finally:
            process.terminate()
            process.wait(10)
