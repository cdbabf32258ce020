"""The network against the original's printed numbers; weights files.

Fixtures in tests/golden: `net_*_keys.json.gz` are the originals, compressed. `net_tiny.npz` is `net_tiny.pt` without what can be made
again (the input, and the weights by the fill rule of tests/golden/README.md):

    g = torch.load('net_tiny.pt', weights_only=True)
    keep = {f'{name}{i}': o for name in ('eval_out', 'train_out') for i,o in enumerate(g[name])}
    keep |= {k: g[k] for k in ('train_loss', 'input_grad')} | {f'running/{k}': v for k,v in g['running_after'].items()}
    np.savez_compressed('net_tiny.npz', **{k: v.detach().numpy() for k,v in keep.items()})
"""
import copy, gzip, json, os, pickle, zlib
from functools import cache
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from posenb.model import (BasicBlock, ConvReLU, backbone_layers, fuse_bn, higher_hrnet, load_weights, read_metadata, read_weights,
                          save_weights)

reduced = dict(width=8, modules=(1,2,2), blocks=2, deconv_width=8, deconv_blocks=2) # the net of net_tiny.*
small = dict(width=8, stem=8, layer1_width=4, layer1_blocks=1, modules=(1,1,1), blocks=1, deconv_blocks=1)
full = dict(coco_w32_512=('w32', 17), coco_w48_640=('w48', 17), crowdpose_w32_512=('w32', 14), crowdpose_w48_640=('w48', 14))

def fill(model):
    "Set every parameter and buffer by the fill rule of the fixtures"
    for key,v in model.state_dict().items():
        r = np.random.RandomState(zlib.crc32(key.encode()))
        if key.endswith('num_batches_tracked'): v.zero_(); continue
        if key.endswith('running_var'): lo,hi = .5,1.5
        elif key.endswith('running_mean') or key.endswith('bias'): lo,hi = -.1,.1
        elif v.ndim == 1: lo,hi = .2,.8
        else: hi = np.sqrt(3/np.prod(v.shape[1:])); lo = -hi
        v.copy_(torch.tensor(r.uniform(lo, hi, tuple(v.shape)).astype(np.float32)))
    return model

def uniform(seed, *shape): return torch.tensor(np.random.RandomState(seed).uniform(-2, 2, shape).astype(np.float32))

@cache
def filled(name): return fill(higher_hrnet(*full[name])).eval() # built once for all tests

def on_meta(*args, **kw):
    with torch.device('meta'): return higher_hrnet(*args, **kw)

def keys(path):
    with gzip.open(path, 'rt') as f: return json.load(f)

def children(model): return {k: sum(p.numel() for p in m.parameters()) for k,m in model.named_children()}

# the same network

@pytest.mark.parametrize('name', ['coco_w32_512', 'coco_w48_640', 'crowdpose_w32_512', 'tiny'])
def test_keys_shapes_and_dtypes_in_order(golden, name):
    model = on_meta('w32', **reduced) if name == 'tiny' else on_meta(*full[name])
    have = [[k, list(v.shape), str(v.dtype)] for k,v in model.state_dict().items()]
    assert have == keys(golden(f'net_{name}_keys.json.gz'))

@pytest.mark.parametrize('name', list(full))
def test_counts(golden, name):
    expected = json.loads(golden('net_full.json').read_text())['nets'][name]
    model = on_meta(*full[name])
    assert children(model) == expected['children']
    assert sum(p.numel() for p in model.parameters()) == expected['n_params']
    assert len(list(model.parameters())) == expected['n_params_tensors']
    assert len(model.state_dict()) == expected['n_state_tensors']
    assert sum(b.numel() for b in model.buffers()) == expected['n_buffers']

def assert_sums(maps, expected, rtol):
    "Shape, sum, mean, standard deviation and range"
    assert list(maps.shape) == expected['shape']
    m = maps.detach().double()
    assert abs(m.sum() - expected['sum']) <= rtol*m.abs().sum()
    for name,value in dict(std=m.std(), absmax=m.abs().max(), min=m.min(), max=m.max()).items():
        assert abs(value - expected[name]) <= rtol*expected['absmax'], name

@pytest.mark.parametrize('name', list(full))
def test_sums_of_outputs(golden, name):
    expected = json.loads(golden('net_full.json').read_text())['nets'][name]['inputs']
    for key,shape,seed in (('seed2_1x3x64x64', (1,3,64,64), 2), ('seed3_1x3x128x192', (1,3,128,192), 3)):
        with torch.no_grad():
            for maps,sums in zip(filled(name)(uniform(seed, *shape)), expected[key]['f32']): assert_sums(maps, sums, 1e-5)

def test_outputs_in_full(golden):
    expected,model,x = np.load(golden('net_coco_w32_512_out64.npz')),filled('coco_w32_512'),uniform(2, 1, 3, 64, 64)
    with torch.no_grad():
        for i,maps in enumerate(model(x)): np.testing.assert_allclose(maps, expected[f'out{i}'], atol=1e-5, rtol=0)
        model.double()
        for i,maps in enumerate(model(x.double())): np.testing.assert_allclose(maps, expected[f'out{i}_f64'], atol=1e-10, rtol=0)
        model.float()

@pytest.mark.parametrize('name', ['coco_w32_512', 'coco_w48_640'])
def test_training_step(golden, name):
    expected = json.loads(golden('net_full.json').read_text())['nets'][name]['train_seed4_2x3x64x64']
    model = fill(higher_hrnet(*full[name])).train()
    outputs = model(uniform(4, 2, 3, 64, 64))
    for maps,sums in zip(outputs, expected['out']): assert_sums(maps, sums, 1e-5)
    loss = sum(maps.square().mean() for maps in outputs)
    loss.backward()
    assert loss.item() == pytest.approx(expected['loss'], rel=1e-5)
    norms = {k: p.grad.norm().item() for k,p in model.named_parameters()}
    for k,norm in expected['grad_norms'].items(): assert norms[k] == pytest.approx(norm, rel=1e-3), k # 1 and 2 threads differ by 6e-4
    np.testing.assert_allclose(model.bn1.running_mean[:8], expected['running_mean_bn1'], atol=1e-6)

def test_reduced_net_in_full(golden):
    expected,norms = np.load(golden('net_tiny.npz')),json.loads(golden('net_tiny_gradnorms.json').read_text())
    model,x = fill(higher_hrnet('w32', **reduced)),uniform(1, 2, 3, 64, 64)
    assert sum(p.numel() for p in model.parameters()) == 986_283
    with torch.no_grad():
        for i,maps in enumerate(model.eval()(x)): np.testing.assert_allclose(maps, expected[f'eval_out{i}'], atol=1e-5, rtol=0)
    outputs = model.train()(x.requires_grad_())
    for i,maps in enumerate(outputs): np.testing.assert_allclose(maps.detach(), expected[f'train_out{i}'], atol=1e-5*np.abs(expected[f'train_out{i}']).max(), rtol=0)
    loss = sum(maps.square().mean() for maps in outputs)
    loss.backward()
    assert loss.item() == pytest.approx(expected['train_loss'].item(), rel=1e-5)
    grad = expected['input_grad']
    np.testing.assert_allclose(x.grad, grad, atol=5e-5*abs(grad).max(), rtol=0)
    assert {k: p.grad.norm().item() for k,p in model.named_parameters()} == pytest.approx(norms, rel=1e-4)
    have = model.state_dict()
    for k in expected.files:
        if k.startswith('running/'): np.testing.assert_allclose(have[k.removeprefix('running/')], expected[k], atol=1e-5, rtol=1e-5)

# its shape

@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 31), st.integers(0, 31))
@settings(max_examples=12, deadline=None)
def test_any_size_gives_maps_or_a_clear_error(h, w, more_h, more_w):
    h,w = 32*h+more_h, 32*w+more_w
    x = torch.zeros(1, 3, h, w)
    if more_h or more_w:
        with pytest.raises(ValueError, match=f'{h} pixels high and {w} wide.*multiples of 32'): small_net()(x)
    else: assert [tuple(o.shape) for o in small_net()(x)] == [(1, 34, h//4, w//4), (1, 17, h//2, w//2)]

@cache
def small_net(): return higher_hrnet('w32', **small).eval()

@given(n_joints=st.integers(1, 30), tag_per_joint=st.booleans(), n_deconvs=st.integers(0, 2), cat_output=st.booleans(),
       deconv_kernel=st.sampled_from([2, 3, 4]), final_kernel=st.sampled_from([1, 3]), data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_outputs(n_joints, tag_per_joint, n_deconvs, cat_output, deconv_kernel, final_kernel, data):
    flags = data.draw(st.lists(st.sampled_from([(True,True), (True,False), (False,True)]), min_size=n_deconvs+1, max_size=n_deconvs+1))
    heat,tags = zip(*flags)
    model = on_meta('w32', n_joints, tag_per_joint=tag_per_joint, n_deconvs=n_deconvs, cat_output=cat_output, heatmap_stages=heat,
                    ae_stages=tags, deconv_kernel=deconv_kernel, final_kernel=final_kernel, **small)
    n_maps = [h*n_joints + t*(n_joints if tag_per_joint else 1) for h,t in flags]
    outputs = model(torch.empty(2, 3, 64, 32, device='meta'))
    assert [tuple(o.shape) for o in outputs] == [(2, n, 16<<i, 8<<i) for i,n in enumerate(n_maps)]

def test_wrong_arguments_say_what_to_give():
    for kw,message in ((dict(arch='w18'), 'choose one of w32, w48, tiny'), (dict(blocks=(1,2)), 'four'), (dict(ae_stages=(True,)), '2 outputs'),
                       (dict(heatmap_stages=(True,False)), 'neither'), (dict(init='zeros'), "'original' or 'kaiming'")):
        with pytest.raises(ValueError, match=message): on_meta(**kw)

def test_blocks_may_differ_by_branch():
    model = on_meta('w32', **dict(small, blocks=(1,2,3,4)))
    assert [[len(b) for b in stage[0].branches] for stage in (model.stage2, model.stage3, model.stage4)] == [[1,2], [1,2,3], [1,2,3,4]]

def test_compiles_as_one_graph():
    x,model = uniform(0, 1, 3, 64, 64),small_net()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    with torch.no_grad():
        for a,b in zip(model(x), compiled(x)): torch.testing.assert_close(a, b)

def test_channels_last_and_bfloat16():
    x = uniform(0, 2, 3, 64, 64)
    model = fill(higher_hrnet('w32', **small)).eval()
    with torch.no_grad():
        plain = model(x)
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        with torch.autocast('cpu', torch.bfloat16): half = model(x)
    for a,b,c in zip(plain, last, half):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert c.dtype == torch.bfloat16 and (a-c).abs().max() < .1*a.abs().max()

# initialisation

def test_initialisation_as_the_original():
    model = higher_hrnet('w32', width=16)
    for name,m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            assert m.weight.abs().max() < .006
            if m.weight.numel() > 10_000: assert m.weight.std().item() == pytest.approx(.001, rel=.05)
            if m.bias is not None: assert not m.bias.any()
        if isinstance(m, nn.BatchNorm2d): assert (m.weight == 1).all() and not m.bias.any()

def test_initialisation_of_kaiming():
    model = higher_hrnet('w32', width=16, init='kaiming', zero_gamma=True)
    conv = model.stage4[0].branches[3][0].conv1
    assert conv.weight.std().item() == pytest.approx((2/(9*conv.out_channels))**.5, rel=.02)
    assert model.final_layers[0].weight.std() < .002
    x = torch.relu(uniform(0, 2, 16, 8, 8))
    block = model.stage4[0].branches[0][0]
    assert isinstance(block, BasicBlock) and torch.equal(block(x), x)
    assert (model.deconv_layers[0][0][1].weight == 1).all()

def test_initialisation_repeats_with_the_seed():
    def drawn():
        torch.manual_seed(3)
        return torch.cat([p.flatten() for p in higher_hrnet('tiny').parameters()])
    assert torch.equal(drawn(), drawn())

# weights files

def same(a, b, **kw):
    for k,v in a.items(): torch.testing.assert_close(b[k], v, atol=0, rtol=0)
    return list(a) == list(b)

@pytest.fixture(scope='module')
def weights(): return fill(higher_hrnet('w32', **small)).state_dict()

def blank(**kw): return higher_hrnet('w32', **dict(small, **kw))

@pytest.mark.parametrize('prefix', ['', 'module.', '1.', 'module.1.', '_orig_mod.', 'module._orig_mod.'])
@pytest.mark.parametrize('wrapped', [False, True])
def test_prefixes_and_checkpoints(tmp_path, weights, prefix, wrapped):
    held,model = {prefix+k: v for k,v in weights.items()},blank()
    optimizer = torch.optim.Adam(model.parameters())
    for p in model.parameters(): p.grad = torch.ones_like(p)
    optimizer.step()
    if wrapped: held = dict(epoch=7, model='pose_higher_hrnet', state_dict=held, best_state_dict=held, perf=7, optimizer=optimizer.state_dict())
    torch.save(held, tmp_path/'checkpoint.pth.tar')
    loaded = load_weights(model, tmp_path/'checkpoint.pth.tar')
    assert same(weights, model.state_dict()) and loaded == (list(weights), [], [])

def test_half_precision_and_the_old_format(tmp_path, weights):
    half = {f'module.1.{k}': v.half() if v.ndim > 1 else v for k,v in weights.items()}
    torch.save(half, tmp_path/'old.pth', _use_new_zipfile_serialization=False)
    model = blank()
    load_weights(model, tmp_path/'old.pth')
    for k,v in model.state_dict().items():
        assert v.dtype == weights[k].dtype
        torch.testing.assert_close(v, weights[k], atol=1e-3, rtol=1e-3)

def test_a_saved_file_is_the_same_for_any_layout_and_wrapper(tmp_path, weights):
    model = blank()
    load_weights(model, weights)
    save_weights(model, tmp_path/'a.safetensors', dict(convention='original', joints='nose, neck'))
    save_weights(nn.DataParallel(model.to(memory_format=torch.channels_last)), tmp_path/'b.safetensors')
    for name in 'ab':
        again = blank()
        load_weights(again, tmp_path/f'{name}.safetensors')
        assert same(weights, again.state_dict())
    assert read_metadata(tmp_path/'a.safetensors') == dict(convention='original', joints='nose, neck')
    assert read_metadata(tmp_path/'b.safetensors') == {}

@given(st.dictionaries(st.text(max_size=20), st.text(max_size=50), max_size=5))
@settings(max_examples=20, deadline=None)
def test_metadata_comes_back(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp('m')/'x.safetensors'
    save_weights(nn.Linear(2, 2), path, texts)
    assert read_metadata(path) == texts

def test_a_save_that_fails_leaves_the_file_before_it(tmp_path, weights, monkeypatch):
    path,model = tmp_path/'w.safetensors',blank()
    load_weights(model, weights)
    save_weights(model, path)
    def full_disk(_): raise OSError('No space left on device')
    monkeypatch.setattr(os, 'fsync', full_disk)
    with pytest.raises(OSError, match='No space'): save_weights(blank(), path)
    assert same(weights, {k: read_weights(path)[k] for k in weights}) and os.listdir(tmp_path) == ['w.safetensors']

def test_numbered_layers_keep_their_names(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    save_weights(model, tmp_path/'w.safetensors')
    assert set(read_weights(tmp_path/'w.safetensors')) == set(model.state_dict())

def test_other_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match='ends in .safetensors'): save_weights(nn.Linear(2, 2), tmp_path/'w.pth')

def test_backbone_of_a_classifier(tmp_path, weights):
    held = {k: v for k,v in weights.items() if k.split('.')[0] in backbone_layers}
    more = {'stage4.0.fuse_layers.1.0.0.0.weight': torch.zeros(2), 'incre_modules.0.0.conv1.weight': torch.zeros(2), 'classifier.weight': torch.zeros(3)}
    torch.save(held | more, tmp_path/'imagenet.pth')
    torch.manual_seed(0)
    model = blank(pretrained=tmp_path/'imagenet.pth')
    torch.manual_seed(0)
    fresh = blank()
    assert same(held, {k: model.state_dict()[k] for k in held})
    assert same(fresh.final_layers.state_dict(), model.final_layers.state_dict())
    loaded = load_weights(model, tmp_path/'imagenet.pth', layers=backbone_layers)
    assert loaded.matched == list(held) and loaded.unused == list(more) and {k.split('.')[0] for k in loaded.missing} == {'final_layers', 'deconv_layers'}
    assert load_weights(model, tmp_path/'imagenet.pth', strict=False) == loaded

def test_half_a_backbone_is_an_error(tmp_path, weights):
    torch.save({k: v for k,v in weights.items() if k.startswith(('conv1', 'layer1'))}, tmp_path/'half.pth')
    with pytest.raises(ValueError, match='names of the model are not in the weights: bn1.weight'): blank(pretrained=tmp_path/'half.pth')

def test_weights_for_other_joints(weights):
    model = blank(n_joints=14)
    with pytest.raises(ValueError, match=r'final_layers.0.weight \(34, 8, 1, 1\) for \(28, 8, 1, 1\).*number of joints'): load_weights(model, weights)
    with pytest.raises(ValueError, match='Shapes differ'): load_weights(model, weights, strict=False)
    assert len(load_weights(model, weights, layers=backbone_layers).matched) == sum(k.split('.')[0] in backbone_layers for k in weights)

def test_names_must_agree(weights):
    less,more = {k: v for k,v in weights.items() if k != 'bn2.bias'},weights | {'extra.weight': torch.zeros(1)}
    with pytest.raises(ValueError, match='1 names of the model are not in the weights: bn2.bias'): load_weights(blank(), less)
    with pytest.raises(ValueError, match='1 names in the weights are not in the model: extra.weight'): load_weights(blank(), more)
    assert load_weights(blank(), less, strict=False).missing == ['bn2.bias']
    assert load_weights(blank(), more, strict=False).unused == ['extra.weight']
    with pytest.raises(ValueError, match='No name agrees'): load_weights(blank(), {'a': torch.zeros(1)}, strict=False)

def test_files_without_batch_counters(weights):
    old = {k: v for k,v in weights.items() if not k.endswith('num_batches_tracked')}
    assert load_weights(blank(), old).matched == list(old)

class Attack:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir,(self.path,)

@pytest.mark.parametrize('zipped', [True, False])
def test_pickled_code_is_not_run(tmp_path, weights, zipped):
    torch.save(dict(state_dict=weights, note=Attack(tmp_path/'attacked')), tmp_path/'w.pth', _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match='wants to run code.*mkdir'): blank(pretrained=tmp_path/'w.pth')
    assert not (tmp_path/'attacked').exists()

@pytest.mark.parametrize('held', [[1, 2], {}, dict(epoch=3), dict(net=dict(a=torch.zeros(1))), torch.zeros(3)])
def test_files_without_a_state_dict(tmp_path, held):
    torch.save(held, tmp_path/'w.pth')
    with pytest.raises(ValueError, match='holds no state dict'): read_weights(tmp_path/'w.pth')

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_nan_is_refused(tmp_path, weights, value, suffix):
    model = blank()
    with torch.no_grad(): model.stage3[0].branches[1][0].conv2.weight[0,0,0,0] = value
    path = tmp_path/f'w.{suffix}'
    save_weights(model, path) if suffix == 'safetensors' else torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match='NaN or infinite values in stage3.0.branches.1.0.conv2.weight'): blank(pretrained=path)

def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='no weights file .*w32.pth'): higher_hrnet('tiny', pretrained=tmp_path/'w32.pth')
    with pytest.raises(FileNotFoundError, match='no weights file'): load_weights(blank(), tmp_path)

@given(st.binary(max_size=300), st.sampled_from(['pth', 'safetensors']), st.booleans())
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings('ignore')
def test_any_other_file_is_a_clear_error(tmp_path_factory, content, suffix, cut):
    path = tmp_path_factory.mktemp('w')/f'w.{suffix}'
    if cut: # the beginning of a good file
        save_weights(nn.Linear(3, 3), path.with_suffix('.safetensors')) if suffix == 'safetensors' else torch.save(nn.Linear(3, 3).state_dict(), path)
        content = path.read_bytes()[:len(content)]
    path.write_bytes(content)
    with pytest.raises(ValueError, match='damaged, or no weights file|holds no state dict|wants to run code'): read_weights(path)

# without batch norm

@pytest.mark.parametrize('kw', [small, dict(small, layer1_block='basic', n_deconvs=2), reduced])
def test_fused_net_gives_the_same_maps(kw):
    model,x = fill(higher_hrnet('w32', **kw)),uniform(5, 2, 3, 64, 96)
    before = {k: v.clone() for k,v in model.state_dict().items()}
    fused = fuse_bn(model)
    assert model.training and same(before, model.state_dict()) and not fused.training
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    with torch.no_grad():
        for a,b in zip(model.eval()(x), fused(x)): assert (a-b).abs().max() <= 1e-4*a.abs().max()

def test_in_one_pass():
    "ReLUs and sums are done by convolutions, where that can be; elsewhere it is the same with more steps"
    fused,x = fuse_bn(fill(higher_hrnet('w32', **small)).eval()),uniform(5, 2, 3, 64, 96)
    assert sum(isinstance(m, ConvReLU) for m in fused.modules()) > 20
    with torch.no_grad(): at_once = fused(x)
    in_steps = fused(x)                                                      # with gradients
    assert in_steps[0].requires_grad and all((a-b).abs().max() <= 1e-5*b.abs().max() for a,b in zip(at_once, in_steps))
    with torch.no_grad():
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))): assert all(map(torch.equal, other(x), at_once))
        fused.conv1.weight *= 2
        assert not torch.equal(fused(x)[0], at_once[0]), 'new weights count'
        assert all(o.isfinite().all() for o in fused.double()(x.double()))   # a format for which there is no such pass

def test_only_what_was_folded_goes_into_one_pass():
    block = BasicBlock(8, 8)
    block.bn2 = nn.GroupNorm(2, 8)
    net = nn.Sequential(block, nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode='reflect'), nn.BatchNorm2d(8), nn.ReLU())).eval()
    fused,x = fuse_bn(net),uniform(5, 1, 8, 16, 16)
    with torch.no_grad(): assert (fused(x) - net(x)).abs().max() < 1e-5
    assert not any(isinstance(m, ConvReLU) for m in fused.modules())

def test_a_norm_that_was_not_folded_stays():
    net = higher_hrnet('w32', **small).eval()
    for m in list(net.modules()):
        for name,child in list(m.named_children()):
            if isinstance(child, nn.Upsample): m[1] = nn.GroupNorm(1, m[0].out_channels)     # between a convolution and its enlarging
    x = uniform(5, 1, 3, 64, 96)
    fill(net)
    with torch.no_grad():
        for a,b in zip(net(x), fuse_bn(net)(x)): assert (a-b).abs().max() <= 1e-4*a.abs().max()

def test_weights_without_versions():
    with torch.inference_mode(): fused,x = fuse_bn(fill(higher_hrnet('w32', **small)).eval()).bfloat16(),uniform(5, 1, 3, 64, 64).bfloat16()
    with torch.no_grad(): assert all(o.isfinite().all() for o in fused(x))

def test_a_fused_network_can_be_exported():
    fused,x = fuse_bn(fill(higher_hrnet('w32', **small)).eval()),uniform(5, 1, 3, 64, 64)
    with torch.no_grad():
        exported = torch.export.export(fused, (x,))
        assert not [n for n in exported.graph.nodes if 'mkldnn' in str(n.target)]
        for a,b in zip(exported.module()(x), fused(x)): assert (a-b).abs().max() <= 1e-5*b.abs().max()
