"Orders of images: what comes how often, epoch by epoch, over several processes, and after a stop"
import itertools, pickle, random
import numpy as np, pytest, torch
from functools import partial
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD
from posenb.checkpoint import Checkpoint, _without_first
from posenb.distributed import RankDL
from posenb.learner import pose_dls
from posenb.samplers import Stretches, aspect_groups, endless, grouped, repeat_factors, set_order

def first(order, n): return list(itertools.islice(order, n))

class EpochDL(DataLoader):
    "The order follows from seed and epoch, as in `PoseDL`"
    def __init__(self, *args, seed=0, **kwargs):
        super().__init__(*args, **kwargs)
        self.epoch,self.seed,self.n_inp = 0,seed,1
    def randomize(self): self.rng = random.Random(f'{self.seed} {self.epoch}')
    def after_iter(self): self.epoch += 1

class PlayedDL(RankDL):
    "One of several processes, in a process of its own"
    def _broadcast(self, indices, rank): return indices

def loader(n, bs=4, workers=0, **kwargs): return EpochDL([(torch.tensor([float(i)]), torch.tensor(float(i))) for i in range(n)], bs=bs, shuffle=True, num_workers=workers, **kwargs)
def read(dl): return [b[0].flatten().int().tolist() for b in dl]

@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), passes=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_passes_are_permutations(n, passes, seed):
    order = np.array(first(endless(n, seed), n*passes)).reshape(passes, n)
    assert (np.sort(order) == np.arange(n)).all()
    if n > 20 and passes > 1: assert (order[0] != order[1]).any()
    assert order.ravel().tolist() == first(endless(n, seed), n*passes)

@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 4), min_size=1, max_size=12), st.integers(0, 2**32))
def test_factors_are_means(factors, seed):
    "Each image comes its factor times a pass on average, the whole part of it in every pass"
    factors = np.array(factors) + .2
    read = np.bincount(first(endless(len(factors), seed, factors), int(2000*factors.sum())), minlength=len(factors))
    np.testing.assert_allclose(read/2000, factors, atol=.06)
    whole = np.floor(factors)
    assert (read >= 1900*whole).all()

@settings(max_examples=40, deadline=None)
@given(st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=30), st.floats(.001, 1))
def test_repeat_factors_are_those_of_lvis(labels, threshold):
    "max over the image's labels of max(1, sqrt(t/f)), by the formula of the paper"
    expected = []
    for of_image in labels:
        factor = 1.
        for label in of_image:
            f = sum(label in other for other in labels)/len(labels)
            factor = max(factor, np.sqrt(threshold/f))
        expected.append(factor)
    np.testing.assert_allclose(repeat_factors([[*l, *l] for l in labels], threshold), expected, rtol=1e-12)

@settings(max_examples=40, deadline=None)
@given(groups=st.lists(st.integers(0, 3), min_size=1, max_size=30), bs=st.integers(1, 6), seed=st.integers(0, 99))
def test_groups(groups, bs, seed):
    "Batches of one group; within a group the order is kept, and nothing waits long"
    n = 30*bs
    order = first(grouped(endless(len(groups), seed), groups, bs), n)
    assert all(len({groups[i] for i in batch}) == 1 for batch in np.reshape(order, (-1, bs)))
    for g in set(groups):
        ours = [i for i in order if groups[i] == g]
        assert ours == first((i for i in endless(len(groups), seed) if groups[i] == g), len(ours))
    early = first(endless(len(groups), seed), n)
    for g in set(groups): assert sum(groups[i] == g for i in order) > sum(groups[i] == g for i in early) - bs*(1+len(set(groups)))

def test_aspects():
    sizes = [(640, 480), (480, 640), (500, 500), (501, 500)]
    assert aspect_groups(sizes).tolist() == [w > h for w,h in sizes]
    assert aspect_groups(sizes, (.8, 1.2)).tolist() == [2, 0, 1, 1]

@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), length=st.integers(1, 70), epochs=st.lists(st.integers(0, 8), min_size=1, max_size=12))
def test_stretches_in_any_order(n, length, epochs):
    stretches,order = Stretches(partial(endless, n), length),first(endless(n), length*9)
    for e in epochs:
        assert stretches(e) == order[e*length:(e+1)*length]
        if e % 3 == 0: stretches = pickle.loads(pickle.dumps(stretches))

@pytest.mark.parametrize('workers', [0, 2])
def test_every_image_equally_often(workers):
    "Epochs are the stretches, whatever the batch; nothing is lost at their ends"
    dl = set_order(loader(10, workers=workers), n_iter=3)
    epochs = [read(dl) for _ in range(5)]
    assert len(dl) == 3 and all([len(b) for b in e] == [4, 4, 4] for e in epochs)
    assert np.concatenate(epochs).ravel().tolist() == first(endless(10), 60)
    assert set(np.bincount(np.concatenate(epochs).ravel())) == {6}

def test_default_length():
    for n,bs,batches in ((10, 4, 2), (8, 4, 2), (3, 4, 1)):
        dl = set_order(loader(n, bs))
        assert len(dl) == batches and sum(read(dl), []) == first(endless(n), batches*bs)
    assert sum(read(set_order(loader(9, seed=5))), []) == first(endless(9, 5), 8)
    assert sum(read(set_order(loader(9, seed=5), seed=6)), []) == first(endless(9, 6), 8)

@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_several_processes_read_the_order_of_one(world_size, monkeypatch):
    "Each step's common batch is the next piece of the order; batches of a group stay whole"
    monkeypatch.setenv('WORLD_SIZE', str(world_size))
    groups = np.arange(20) % 3
    parts = [PlayedDL(set_order(loader(20), n_iter=7, groups=groups), pad=True, rank=r, world_size=world_size) for r in range(world_size)]
    assert [len(dl) for dl in parts] == [7]*world_size
    epochs = [[read(dl) for dl in parts] for _ in range(3)]
    together = [i for epoch in epochs for step in zip(*epoch) for batch in step for i in batch]
    assert together == first(grouped(endless(20), groups, 4), 3*7*4*world_size)
    assert all(len(set(groups[batch])) == 1 for epoch in epochs for rank in epoch for batch in rank)

class Seen(Callback):
    "The images of each step; raises an error after `stop` steps"
    def __init__(self, stop=None): self.stop,self.steps = stop,[]
    def before_batch(self):
        if self.training: self.steps.append(self.xb[0].flatten().int().tolist())
        if len(self.steps) == self.stop: raise InterruptedError('stopped')

def learner(folder, cbs, workers=0):
    torch.manual_seed(0)
    dls = DataLoaders(set_order(loader(10, workers=workers), n_iter=6, factors=[1, 3, .5]*3 + [1], groups=[0, 1]*5), loader(4))
    dls.n_inp = 1
    return Learner(dls, nn.Sequential(nn.Linear(1, 1), nn.Flatten(0)), loss_func=nn.functional.mse_loss, opt_func=partial(SGD, mom=0), lr=1e-4, path=folder, cbs=cbs)

def fit(learn, n):
    with learn.no_logging(): learn.fit(n)

@pytest.mark.parametrize('stop', [3, 6, 9, 12, 17])
def test_stop_and_go_on(stop, tmp_path):
    "A training that was stopped reads the same images as one that was not"
    whole = Seen()
    fit(learner(tmp_path/'a', [whole]), 3)
    assert len(whole.steps) == 18 and sum(whole.steps, []) == first(grouped(endless(10, 0, [1, 3, .5]*3 + [1]), [0, 1]*5, 4), 72)
    before,after = Seen(stop),Seen()
    with pytest.raises(InterruptedError): fit(learner(tmp_path/'b', [before, Checkpoint(tmp_path/'b'/'checkpoints', iters=1)]), 3)
    learn = learner(tmp_path/'b', [after, Checkpoint(tmp_path/'b'/'checkpoints', resume=True)])
    fit(learn, 3)
    assert learn.train_iter == 18
    assert after.steps == whole.steps[len(whole.steps)-len(after.steps):] and len(after.steps) >= 18-stop

def test_other_loaders_are_refused():
    with pytest.raises(TypeError, match='DataLoader has no `epoch`'): set_order(DataLoader(list(range(5)), bs=2, shuffle=True))
    with pytest.raises(TypeError, match='before `distributed`'): set_order(PlayedDL(loader(8), rank=0, world_size=2))
    with pytest.raises(ValueError, match='does not shuffle'): set_order(EpochDL(list(range(5)), bs=2))
    for bad,message in ((dict(n_iter=0), 'at least 1'), (dict(factors=[1]), 'one number for each of 5'), (dict(factors=[-1]*5), 'not negative'),
                        (dict(factors=[np.nan]*5), 'finite'), (dict(groups=[1]*4), 'groups has 4 entries')):
        with pytest.raises(ValueError, match=message): set_order(loader(5), **bad)

@pytest.mark.parametrize('workers', [0, 2])
def test_an_image_that_comes_again_is_seen_through_another_crop(synth, workers):
    "The same crops with workers, and where a training goes on in the middle of the epoch"
    def batches(skip=0, workers=0):
        train = set_order(pose_dls(synth, size=64, bs=4, workers=workers, seed=5).train, n_iter=12)
        train.epoch = 1
        order = train.get_idxs()
        if skip: train.get_idxs = partial(_without_first, skip*train.bs, train.get_idxs)
        return order, [images for images,*_ in train], train
    order,whole,train = batches()
    n = len(train.dataset)
    assert sorted(order) != sorted(i % n for i in order) and len(set(order)) == len(order) == 48
    crops = {i: whole[k//4][k % 4] for k,i in enumerate(order)}
    for a,b in itertools.combinations(order, 2):
        if a % n == b % n: assert not torch.equal(crops[a], crops[b])
    train.dataset.epoch = 1
    assert torch.equal(train.create_batch([train.dataset[order[0]]])[0], train.create_batch([train.create_item(order[0])])[0])
    for skip in (0, 5):
        for a,b in zip(whole[skip:], batches(skip, workers)[1], strict=True): assert torch.equal(a, b)
