"The training command as a process: what it leaves, what it says about mistakes, and what a signal does"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest

def command(*args): return [sys.executable, '-W', 'ignore', '-m', 'posenb.train', *map(str, args)]

def run(*args, cwd): return subprocess.run(command(*args), cwd=cwd, capture_output=True, text=True, timeout=300)

def small(synth): return ['--data', synth, '--size', 64, '--test-size', 64, '--bs', 8, '--workers', 0, '--out', 'run']

@pytest.mark.parametrize('args, words', [
    (['--data', 'nowhere'], ['nowhere', 'no such folder']), (['--size', 100], ['size', '32', '100']), (['--arch', 'w99'], ['w99', 'tiny']),
    (['--precision', 'half'], ['precision', 'half']), (['--pretrained', 'gone.pth'], ['gone.pth'])])
def test_mistakes_are_answered_in_a_sentence(args, words, synth, tmp_path):
    done = run(*small(synth.resolve()), *args, cwd=tmp_path)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    for word in words: assert word in done.stderr
    assert not (tmp_path/'run'/'weights.safetensors').exists()

def test_sigterm_ends_the_training_and_keeps_what_was_learned(synth, tmp_path):
    with subprocess.Popen(command(*small(synth.resolve()), '--epochs', 10_000), cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        history = tmp_path/'run'/'history.csv'
        start = time.time()
        while not (history.exists() and len(history.read_text().splitlines()) > 2):
            assert process.poll() is None and time.time() < start+200
            time.sleep(.5)
        process.send_signal(signal.SIGTERM)
        out,_ = process.communicate(timeout=120)
    assert process.returncode == 0 and 'stopped in epoch' in out
    assert json.loads((tmp_path/'run'/'metrics.json').read_text())['stopped'] is True
    assert (tmp_path/'run'/'weights.safetensors').stat().st_size > 1e6
