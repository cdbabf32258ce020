"The training command as a process: what it leaves, what it says about mistakes, and what a signal does"
import dataclasses, inspect, json, os, re, shutil, signal, subprocess, sys, time, torch
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from fastcore.docments import docments
from posenb.callbacks import Accumulate, ClipGrad, FreezeBN
from posenb.checkpoint import list_checkpoints, read_checkpoint
from posenb.log import DeviceSmoothLoss
from posenb.model import save_weights
from posenb.train import (Recipe, evaluate_run, finish, locked, main, parser, read_recipe, recipe_learner, recipes, run_weights, save_recipe, train,
                          training_callbacks)
from safetensors.torch import load_file

def command(*args): return [sys.executable, '-W', 'ignore', '-m', 'posenb.train', *map(str, args)]

def run(*args, cwd): return subprocess.run(command(*args), cwd=cwd, capture_output=True, text=True, timeout=300)

@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch): monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')     # where a training is repeated to the bit

def small(synth): return ['--data', synth, '--size', 64, '--test-size', 64, '--bs', 8, '--workers', 0, '--ap_every', 0, '--scales', 1, '--out', 'run']

@pytest.mark.parametrize('args, words', [(['--arch', 'w99'], ['w99', 'tiny']), (['--epoch', 3], ["'epochs'"])])
def test_mistakes_are_answered_in_a_sentence(args, words, synth, tmp_path):
    done = run(*small(synth.resolve()), *args, cwd=tmp_path)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    for word in words: assert word in done.stderr
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('args, words', [
    (['--data', 'nowhere'], ['nowhere', 'no such folder']), (['--size', 100], ['size', '32', '100']), (['--precision', 'half'], ['precision', 'half']),
    (['--pretrained', 'gone.pth'], ['gone.pth']), (['--epochs', 'many'], ['epochs', 'many']), (['--optimizer', 'adma'], ['optimizer', "'adam'"]),
    (['--test_size', 100], ['test_size', '100', '32']), (['--test_size', 0], ['test_size', '32']), (['--scales', '1,x'], ['scales', 'x']), (['--scales', 0], ['scales', '0.01']),
    (['--scales='], ['scales']), (['--scales', '0.5,2'], ['scales', '1']), (['--detection_threshold', -1], ['detection_threshold', '0']),
    (['--bs', 0], ['bs: at least 1']), (['--bs', -4], ['bs: at least 1']), (['--workers', -1], ['workers: at least 0']), (['--seed', -1], ['seed', '0']),
    (['--epochs', 0], ['epochs: at least 1']), (['--ema', 2], ['ema', '0 to 1']), (['--lr', 'nan'], ['lr']), (['--epochs', 'inf'], ['epochs'])])
def test_what_cannot_work_is_said_before_a_run_begins(args, words, synth, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main([*map(str, small(synth.resolve())), *map(str, args)])
    for word in words: assert word in str(e.value)
    assert '\n' not in str(e.value) and not any(tmp_path.iterdir())

@pytest.mark.parametrize('args, words', [
    (['--resume', 'nowhere'], ['nowhere']), (['--evaluate', 'nowhere'], ['nowhere']), (['--out', 'x', '--resume', 'y'], ['out', '--resume']),
    (['people', '--resume', 'y'], ['recipe', '--resume']), (['--evaluate', 'x', '--resume', 'y'], ['resume', '--evaluate'])])
def test_no_argument_is_ignored(args, words):
    with pytest.raises(SystemExit) as e: main(args)
    for word in words: assert word in str(e.value)

def test_an_image_that_cannot_be_tested_is_named_before_a_run_begins(synth, tmp_path):
    data = shutil.copytree(synth, tmp_path/'data')
    broken = sorted((data/'val2017').iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(OSError, match=f'1 of 8 images to be tested.*{broken.name}.*breaks off.*person_keypoints_val2017.json'): train(data=data, size=64, test_size=64, workers=0, out=tmp_path/'run')
    assert not (tmp_path/'run').exists()

def tiny_learner(synth, **settings):
    return recipe_learner(read_recipe(**{**dict(data=synth, size=64, test_size=64, bs=8, workers=0, scales=1), **settings}))

def test_the_cause_of_a_failed_evaluation_is_shown(synth, tmp_path, monkeypatch):
    def fails(*args, **kwargs): raise ValueError('the cause')
    monkeypatch.setattr('posenb.learner.pose_ap', fails)
    with pytest.raises(SystemExit) as e: main([*map(str, small(synth.resolve())[:-1]), str(tmp_path/'run'), '--epochs', '1'])
    assert str(e.value) == 'posenb_train: the cause'

def test_weights_are_kept_even_if_they_cannot_be_evaluated(synth, tmp_path, monkeypatch):
    learn = tiny_learner(synth)
    def fails(): raise ValueError
    learn.train_iter,learn.evaluate = 3,fails
    with pytest.raises(ValueError): finish(learn, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['weights.safetensors']

@pytest.mark.parametrize('name', [n for n in recipes if n.startswith('crowdpose')])
def test_crowdpose_recipes_come_to_their_end(name, crowdpose, tmp_path):
    changes = dict(arch='tiny', size=64, test_size=64, bs=2, workers=0, epochs=1, precision='float32', sync_bn=False, pretrained=None)
    train(name, data=crowdpose, out=tmp_path/'run', **changes)
    assert 'AP hard' in json.loads((tmp_path/'run'/'metrics.json').read_text())

# ---------------------------------------------------------------- settings

def test_every_setting_has_a_line_of_help_and_is_read():
    text,docs = inspect.getsource(sys.modules['posenb.train']),docments(Recipe)
    for f in dataclasses.fields(Recipe):
        assert docs[f.name], f'{f.name} has no line of help'
        assert re.search(rf'\b(r|recipe)\.{f.name}\b', text), f'{f.name} is read nowhere'

def callback(learn, kind): return next((cb for cb in learn.cbs if isinstance(cb, kind)), None)

def test_settings_of_the_engine_reach_it(synth):
    plain,learn = tiny_learner(synth),tiny_learner(synth, accumulate=3, clip=.5, freeze_bn=True, exif=False)
    assert not any(callback(plain, kind) for kind in (Accumulate, ClipGrad, FreezeBN))
    assert callback(learn, Accumulate).n_batches == 3 and callback(learn, ClipGrad).norm == .5 and callback(learn, FreezeBN)
    for ds in (learn.dls.train_ds, learn.dls.valid_ds, learn.dls.test): assert not ds.exif
    for ds in (plain.dls.train_ds, plain.dls.valid_ds, plain.dls.test): assert ds.exif

def test_settings_of_the_engine_have_an_effect(synth):
    def trained(**settings):
        "Norms of the gradients of an epoch's steps, and whether batch normalisation kept its statistics"
        learn,norms = tiny_learner(synth, bs=4, ema=0, optimizer='adam', **settings),[]
        learn.create_opt()
        step,statistics = learn.opt.step,lambda: torch.cat([b for k,b in learn.model.named_buffers() if 'running' in k])
        def counted(**kwargs):
            norms.append(torch.stack([p.grad.norm() for p in learn.model.parameters() if p.grad is not None]).norm().item())
            return step(**kwargs)
        learn.opt.step,before = counted,statistics()
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4)
        return norms,torch.equal(before, statistics())
    (plain,kept),(fewer,_),(shorter,_),(_,frozen) = trained(),trained(accumulate=2),trained(clip=1e-4),trained(freeze_bn=True)
    assert len(plain) == 3 and len(fewer) == 2 and max(shorter) < 1.01e-4 < min(plain) and frozen and not kept

# ---------------------------------------------------------------- stopped runs

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
    done = run(*args, cwd=tmp_path)                          # the same command
    assert done.returncode == 0 and 'the run in run goes on from checkpoint_' in done.stdout, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ['run', 'whole']
    assert (tmp_path/'run'/'history.csv').read_text() == (tmp_path/'whole'/'history.csv').read_text()
    assert epochs(tmp_path/'run') == epochs(tmp_path/'whole') == [str(i) for i in range(6)]
    whole,resumed = (load_file(tmp_path/name/'weights.safetensors') for name in ('whole', 'run'))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)

def test_which_folders_are_entered_again(synth, tmp_path, capsys):
    "An unfinished run of the same recipe that nobody works on; its weights are not read from elsewhere again"
    settings = dict(data=synth, size=64, test_size=64, bs=8, workers=0, ap_every=0, scales=1., out=tmp_path/'run', pretrained=tmp_path/'start.safetensors')
    save_weights(tiny_learner(synth).model, settings['pretrained'])
    train(epochs=1, **settings)
    assert 'matched' in capsys.readouterr().out
    train(epochs=1, **settings)                              # it had come to its end
    assert (tmp_path/'run-2'/'weights.safetensors').exists()
    for name in ('metrics.json', 'weights.safetensors'): (tmp_path/'run'/name).unlink()
    settings['pretrained'].unlink()
    code = f"import time; from posenb.train import locked\nwith locked({str(tmp_path/'run')!r}): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(FileNotFoundError): train(epochs=1, **settings)        # a third folder, which needs the weights
        with pytest.raises(BlockingIOError, match='another process'): train(resume=tmp_path/'run')
        other.kill()
    learn = train(epochs=1, **settings)
    assert isinstance(learn.recorder.smooth_loss, DeviceSmoothLoss) and len(learn.recorder.losses) == 1
    assert 'goes on from checkpoint_0000001' in capsys.readouterr().out and (tmp_path/'run'/'metrics.json').exists() and not (tmp_path/'run-3').exists()

def test_what_is_evaluated(synth, tmp_path, capsys):
    "What is furthest on; or a file by its name, with the recipe beside it or a given one"
    run = tmp_path/'run'
    settings = dict(data=synth, size=64, test_size=64, bs=8, workers=0, scales=1., ema=0., out=run)
    train(epochs=2, ap_every=1, **settings)
    best = run/'checkpoints'/'best.safetensors'
    assert read_checkpoint(best)['callbacks']['checkpoint']['best']['epoch'] in (0, 1)
    whole = json.loads((run/'metrics.json').read_text())
    assert run_weights(run) == run/'weights.safetensors'
    last = list_checkpoints(run/'checkpoints')[-1]
    for path in (run, last, run/'weights.safetensors', run/'checkpoints'):
        assert evaluate_run(path)['AP'] == whole['AP'] and ('weights.safetensors' if path in (run, run/'weights.safetensors') else last.name) in capsys.readouterr().out
    later = last.with_name('checkpoint_0000099.safetensors')
    shutil.copy(last, later)
    assert run_weights(run) == later                         # a run that was to go on and was killed
    alone = shutil.copy(run/'weights.safetensors', tmp_path/'alone.safetensors')
    (tmp_path/'deep'/'er').mkdir(parents=True)
    alone = shutil.move(alone, tmp_path/'deep'/'er')
    with pytest.raises(FileNotFoundError, match='no recipe.yaml beside it'): evaluate_run(alone)
    assert evaluate_run(alone, run/'recipe.yaml')['AP'] == whole['AP']
    with pytest.raises(ValueError, match='another network'): evaluate_run(alone, run/'recipe.yaml', arch='w32')

@pytest.mark.parametrize('name', list(recipes))
def test_recipes_of_the_paper(name):
    "The settings of the original's files"
    r = recipes[name]
    if name == 'people': return
    data,arch,size,*_ = name.split('_')
    assert (r.arch, r.size, r.test_size) == (arch, int(size), int(size)) and (r.train_split == 'trainval') == (data == 'crowdpose')
    assert (r.lr, r.epochs, r.steps, r.wd, r.warmup, r.ae_weight, r.foreground, r.optimizer) == (1e-3, 300, (200, 260), 0, 0, 1e-3, 0, 'adam')
    assert (r.smallest_crop, r.largest_crop, r.max_rotation, r.convention, r.detection_threshold) == (.75, 1.5, 30, 'original', .1)
    assert not r.exif and r.bs == (10 if arch == 'w48' else 12) and (r.precision == 'fp16') == (r.size == 640)
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
    done = subprocess.run([sys.executable, '-W', 'ignore', '-m', *launcher, '-m', 'posenb.train', '--evaluate', 'run'], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('weights.safetensors') == 1 and done.stdout.count('AP50') == 1

DIES = '''
import os, sys
from fastai.callback.core import Callback
from posenb.train import train
class Dies(Callback):
    def before_epoch(self):
        if self.epoch == 2 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1': os._exit(1)
train(data=sys.argv[1], size=64, test_size=64, bs=4, workers=0, ap_every=0, scales=1., epochs=3, out='run', cbs=Dies())
'''

def test_a_launcher_that_starts_again_goes_on(synth, tmp_path):
    (tmp_path/'dies.py').write_text(DIES)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--max-restarts', '1', 'dies.py', synth.resolve()],
                          cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('goes on from') == 1 and epochs(tmp_path/'run') == ['0', '1', '2'] and sorted(p.name for p in tmp_path.iterdir()) == ['dies.py', 'run']
