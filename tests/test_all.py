"The modules together: names, imports, and the door for notebooks"
import importlib, pkgutil, re, subprocess, sys
from pathlib import Path
import pytest, posenb

modules = sorted(m.name for m in pkgutil.iter_modules(posenb.__path__) if not m.name.startswith('_') and m.name not in ('all', 'bench'))     # bench is a command
low = 'skeleton synthetic augment dataset targets model loss group predict evaluate show'.split()

def python(code): return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True).stdout

def test_no_two_modules_export_one_name():
    owner = {}
    for m in modules:
        for name in importlib.import_module(f'posenb.{m}').__all__: owner.setdefault(name, []).append(m)
    assert not {name:ms for name,ms in owner.items() if len(ms) > 1}

def test_the_door_leads_to_everything():
    import posenb.all as door
    for m in modules:
        module = importlib.import_module(f'posenb.{m}')
        for name in module.__all__: assert getattr(door, name) is getattr(module, name), f'{name} of posenb.{m} is not in posenb.all'

def test_the_package_alone_imports_nothing(): assert 'torch' not in python('import sys, posenb; print(*sys.modules)').split()

def test_low_modules_do_without_fastai():
    code = f'import sys\nfor m in {low}: __import__("posenb."+m)\nprint(*[m for m in sys.modules if m.split(".")[0] == "fastai"])'
    assert not python(code).split()

@pytest.mark.parametrize('module', low)
def test_each_module_can_be_imported_first(module): python(f'import posenb.{module}')

def test_the_lines_of_the_readme_run(synth, monkeypatch, tmp_path):
    "With less data and one epoch"
    import matplotlib
    matplotlib.use('Agg')
    code = re.search(r'```python\n(.*?)```', (Path(__file__).parent.parent/'README.md').read_text(encoding='utf-8'), re.S)[1]
    for long,short in (("synth_people('../data/people')", repr(str(synth.resolve()))), ('size=192, bs=16', 'size=64, bs=4, workers=0'), ('fit_one_cycle(10', 'fit_one_cycle(1')):
        assert code.count(long) == 1
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names['learn'].metrics[-1].history
