"The Makefile on machines that lack something"
import os, shutil, subprocess
import pytest
from pathlib import Path

pytestmark = pytest.mark.skipif(os.name != 'posix' or not shutil.which('make'), reason='needs make')

python = """#!/bin/sh
[ "$1" = -c ] && exit 0
mkdir -p "$3/bin"   # what venv leaves where ensurepip is missing: a python without pip
printf '#!/bin/sh\\nexit 1\\n' > "$3/bin/python" && chmod +x "$3/bin/python"
exit 1
"""

def test_a_half_made_environment_is_made_again(tmp_path):
    "Where the venv module is not complete, every call says so, not only the first"
    (tmp_path/'python').write_text(python)
    (tmp_path/'python').chmod(0o755)
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'Makefile'): shutil.copy(Path(__file__).parent.parent/name, tmp_path)
    for _ in range(2):
        ran = subprocess.run(['make', 'train', f'PYTHON={tmp_path}/python'], cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode and 'install the venv module' in ran.stderr
