"The benchmark: every row runs and gives a number, plain versions agree with ours, and what the command leaves behind"
import json, subprocess, sys, time
import numpy as np, pytest, torch
from dataclasses import replace
from posenb import bench
from posenb.bench import Case, Work, growths, measure, measure_row, quick, rows

@pytest.fixture(scope='module')
def case(synth): return Case(data=str(synth), **quick)

@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

def command(*args): return [sys.executable, '-W', 'ignore', '-m', 'posenb.bench', *map(str, args)]

def run(*args, cwd): return subprocess.run(command(*args), cwd=cwd, capture_output=True, text=True, timeout=120)

@pytest.mark.parametrize('name', [name for name in rows if not name.startswith('import')])
def test_every_row_gives_a_number(name, case):
    row = rows[name]
    figures = measure_row(row.run, replace(case, **row.changes), 1, row.unit)
    assert np.isfinite(figures['value'])
    if row.unit in ('ms', '/s'): assert figures['value'] > 0 and figures['runs'] == 1

@pytest.mark.parametrize('people', [1, 3])
def test_plain_versions_give_the_same(people, case):
    case = replace(case, people=people, size=128)
    for row in (bench.loss, bench.tags):
        work = row(case)
        for a,b in zip(work.run(), work.plain()): torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    work = bench.grouping(case)
    np.testing.assert_array_equal(work.run(), work.plain())

def test_functions_are_called_in_turn_and_warmed_up():
    calls = []
    times = measure(lambda: calls.append('a'), lambda: calls.append('b'), n=3)
    assert calls == ['a', 'b']*4 and times.shape == (3, 2, 2)

def test_time_is_limited_but_measured_once_at_least():
    calls = []
    assert len(measure(lambda: calls.append(1), n=5, limit=0)) == 1 and len(calls) == 2

def test_time_is_that_of_an_image():
    figures = measure_row(lambda case: Work(lambda: time.sleep(.02), 4), Case(), 3)
    assert 5 <= figures['value'] < 20
    assert measure_row(lambda case: Work(lambda: time.sleep(.02), 4), Case(), 3, '/s')['value'] <= 200

def test_growth_is_over_fields_of_the_case_and_names_functions_of_the_module():
    for field,(values,lines) in growths.items():
        assert hasattr(Case(), field) and list(values) == sorted(values)
        for function,changes in lines.values(): assert getattr(bench, function.__name__) is function and set(changes) <= set(Case.__dataclass_fields__)
    for row in rows.values(): assert getattr(bench, row.run.__name__) is row.run and set(row.changes) <= set(Case.__dataclass_fields__)

def test_memory_that_grows_is_noticed(case, monkeypatch):
    kept = []
    monkeypatch.setattr(bench, 'group', lambda *args: kept.append(np.ones(1 << 20)))
    assert bench.leak(case) > 50

def test_the_command_prints_a_table_and_writes_json(synth, tmp_path):
    done = run('--quick', '--rows', 'tags', '--threads', 1, '--n', 2, '--data', synth.resolve(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'associative embedding' in done.stdout and '1T' in done.stdout and 'original' not in done.stdout
    written = json.loads((tmp_path/'bench.json').read_text())
    assert written['quick'] and set(written['rows']) == {'tags'} and written['rows']['tags']['1T']['plain'] > 1
    assert written['machine']['torch'] == torch.__version__
    assert [f.name for f in tmp_path.iterdir()] == ['bench.json']

@pytest.mark.parametrize('args, words', [
    (['--rows', 'lost'], ["'lost'", 'import_group']), (['--threads', '0'], ['--threads', "'0'"]), (['--n', '0'], ['--n', '1 or more']), (['--data', 'nowhere'], ['nowhere', 'no such folder'])])
def test_mistakes_are_answered_in_a_sentence(args, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: bench.main(args)
    assert not list(tmp_path.iterdir())
    for word in words: assert word in str(e.value)

def test_help_has_a_line_for_everything(capsys):
    with pytest.raises(SystemExit): bench.main(['--help'])
    shown = capsys.readouterr().out
    for name,row in rows.items(): assert f'{name} ' in shown and row.text in shown
    assert '--task' not in shown
