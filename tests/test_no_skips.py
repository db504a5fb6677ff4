"""``make test-extras`` passes only if every test that needs an extra has run."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WHOLE_FILE = "import pytest\npytest.importorskip('nowhere', reason='needs the extra')\ndef test_it(): pass\n"
ONE_TEST = "import pytest\ndef test_it(): pytest.skip({!r})\ndef test_other(): pass\n"


@pytest.mark.parametrize(
    ("test", "code"),
    [
        ("def test_it(): pass\n", 0),
        (ONE_TEST.format("no Chromium on this machine"), 0),
        (ONE_TEST.format("no folder data; LORA_GUARD_SHARED_DATA names the one with the data sets"), 0),
        (ONE_TEST.format("no such module"), 1),
        (WHOLE_FILE, 1),
    ],
)
def test_a_skip_fails_the_run_unless_the_machine_is_its_reason(test: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text("def test_it(): pass\n")
    (tmp_path / "test_made.py").write_text(test)
    words = ["-m", "pytest", "-q", "-p", "tests.no_skips", "-c", "/dev/null", f"--rootdir={tmp_path}", str(tmp_path)]
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    assert ("FAILED for it was skipped: test_made.py" in result.stdout) == bool(code)


def test_make_runs_the_extras_under_this_rule() -> None:
    assert "pytest -q -m extras -p tests.no_skips" in (ROOT / "Makefile").read_text("utf-8")
