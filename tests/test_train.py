"The training command as a process: what it leaves, what it says about mistakes, and what a signal does"
import json, os, signal, subprocess, sys, time, torch
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from posenb.train import parser, read_recipe, recipes, save_recipe
from safetensors.torch import load_file

def command(*args): return [sys.executable, '-W', 'ignore', '-m', 'posenb.train', *map(str, args)]

def run(*args, cwd): return subprocess.run(command(*args), cwd=cwd, capture_output=True, text=True, timeout=300)

def small(synth): return ['--data', synth, '--size', 64, '--test-size', 64, '--bs', 8, '--workers', 0, '--ap_every', 0, '--scales', 1, '--out', 'run']

@pytest.mark.parametrize('args, words', [
    (['--data', 'nowhere'], ['nowhere', 'no such folder']), (['--size', 100], ['size', '32', '100']), (['--arch', 'w99'], ['w99', 'tiny']),
    (['--precision', 'half'], ['precision', 'half']), (['--pretrained', 'gone.pth'], ['gone.pth']), (['--epoch', 3], ["'epochs'"]),
    (['--epochs', 'many'], ['epochs', 'many']), (['--optimizer', 'adma'], ['optimizer', "'adam'"]), (['--resume', 'nowhere'], ['nowhere']),
    (['--test_size', 100], ['100', '32']), (['--scales', '1,x'], ['scales', 'x'])])
def test_mistakes_are_answered_in_a_sentence(args, words, synth, tmp_path):
    done = run(*small(synth.resolve()), *args, cwd=tmp_path)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    for word in words: assert word in done.stderr
    assert not (tmp_path/'run'/'weights.safetensors').exists()

def until(process, done, seconds=200):
    "Wait until `done()`"
    end = time.time()+seconds
    while not done():
        assert process.poll() is None and time.time() < end, process.communicate()[0]
        time.sleep(.2)

def start(*args, cwd): return subprocess.Popen(command(*args), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def epochs(run): return [line.split(',')[0] for line in (run/'history.csv').read_text().splitlines()[1:]] if (run/'history.csv').exists() else []

def test_ctrl_c_ends_the_training_and_keeps_what_was_learned(synth, tmp_path):
    with start(*small(synth.resolve()), '--epochs', 10_000, cwd=tmp_path) as process:
        until(process, lambda: len(epochs(tmp_path/'run')) > 1)
        process.send_signal(signal.SIGINT)
        out,_ = process.communicate(timeout=120)
    assert process.returncode == 0 and 'stopped in epoch' in out
    assert json.loads((tmp_path/'run'/'metrics.json').read_text())['stopped'] is True
    assert (tmp_path/'run'/'weights.safetensors').stat().st_size > 1e6

def test_a_run_that_was_stopped_goes_on(synth, tmp_path):
    "SIGTERM leaves a checkpoint; the resumed run ends with the weights of one that was never stopped"
    args = [*small(synth.resolve()), '--epochs', 6]
    assert run(*args[:-3], 'whole', *args[-2:], cwd=tmp_path).returncode == 0
    with start(*args, cwd=tmp_path) as process:
        until(process, lambda: len(epochs(tmp_path/'run')) > 1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 128+signal.SIGTERM and not (tmp_path/'run'/'metrics.json').exists()
    done = run('--resume', 'run', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert epochs(tmp_path/'run') == epochs(tmp_path/'whole') == [str(i) for i in range(6)]
    whole,resumed = (load_file(tmp_path/name/'weights.safetensors') for name in ('whole', 'run'))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)

@pytest.mark.parametrize('name', list(recipes))
def test_recipes_of_the_paper(name):
    "The settings of the original's files"
    r = recipes[name]
    if name == 'people': return
    data,arch,size,*_ = name.split('_')
    assert (r.arch, r.size, r.test_size) == (arch, int(size), int(size)) and (r.train_split == 'trainval') == (data == 'crowdpose')
    assert (r.lr, r.epochs, r.steps, r.wd, r.warmup, r.ae_weight, r.foreground, r.optimizer) == (1e-3, 300, (200, 260), 0, 0, 1e-3, 0, 'adam')
    assert (r.smallest_crop, r.largest_crop, r.max_rotation, r.convention, r.detection_threshold) == (.75, 1.5, 30, 'original', .1)
    assert r.bs == (10 if arch == 'w48' else 12) and (r.precision == 'fp16') == (r.size == 640)
    assert r.sync_bn == name.endswith('syncbn') and (r.pretrained_layers == 'backbone') == name.endswith('_coco')

@given(st.fixed_dictionaries({}, optional=dict(epochs=st.integers(1, 500), lr=st.floats(1e-6, 1), scales=st.lists(st.floats(.25, 2), min_size=1, max_size=4).map(tuple),
                                               sync_bn=st.booleans(), data=st.none() | st.text('abc/.', min_size=1), arch=st.sampled_from(['tiny', 'w32']))))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_recipes_are_the_same_from_python_a_file_and_the_command_line(tmp_path, changes):
    recipe = read_recipe(**changes)
    save_recipe(recipe, tmp_path/'r.yaml')
    assert read_recipe(tmp_path/'r.yaml') == recipe
    spelled = [f'--{k}={",".join(map(repr, v)) if isinstance(v, tuple) else "none" if v is None else v}' for k,v in changes.items()]
    given = {k:v for k,v in vars(parser().parse_args(spelled)).items() if k in changes}
    assert read_recipe(**given) == recipe

@pytest.mark.parametrize('launcher', [['torch.distributed.run', '--standalone', '--nproc-per-node', '2'],
                                      ['accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--main_process_port', '0']])
def test_two_processes_train_one_network(launcher, synth, tmp_path):
    "One folder, one line an epoch, every image evaluated once"
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-m', *launcher, '-m', 'posenb.train', *map(str, small(synth.resolve())), '--bs', '4', '--epochs', '2'],
                          cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '2 processes' in done.stdout and epochs(tmp_path/'run') == ['0', '1'] and [p.name for p in tmp_path.iterdir()] == ['run']
    assert {'weights.safetensors', 'metrics.json', 'results.json', 'predictions.png'} <= {p.name for p in (tmp_path/'run').iterdir()}
