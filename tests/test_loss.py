"The loss: equal to the original's numbers, to a plain loop, with true gradients, finite where there is nobody"
import json, warnings
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from posenb.loss import PoseLoss, ae_loss, heatmap_loss, person_tags, push_loss

@pytest.fixture(scope='module')
def printed(golden): return np.load(golden('loss.npz')), json.loads(golden('loss.json').read_text())

def gradients(loss, *inputs): return torch.autograd.grad(loss, inputs, allow_unused=True)

def close(a, b, eps=1e-6): np.testing.assert_allclose(a.detach().numpy() if torch.is_tensor(a) else a, b, rtol=eps, atol=eps)

def close_gradient(a, b): np.testing.assert_allclose(a.numpy(), b, rtol=1e-5, atol=1e-6*abs(b).max())

# ---- the original's numbers

def test_heatmap_golden(printed):
    arrays,_ = printed
    pred,gt,mask = (torch.tensor(arrays[f'hm/{name}']) for name in ('pred', 'gt', 'mask'))
    loss = heatmap_loss(pred.requires_grad_(), gt, mask)
    close(loss, arrays['hm/loss'])
    close_gradient(gradients(loss.sum(), pred)[0], arrays['hm/grad_of_sum'])

@pytest.mark.parametrize('kind', ['exp', 'max'])
def test_ae_golden(printed, kind):
    arrays,_ = printed
    tags,joints = torch.tensor(arrays['ae/tags'], requires_grad=True),torch.tensor(arrays['ae/joints'])
    push,pull = ae_loss(tags, joints, kind)
    close(push, arrays[f'ae/{kind}/push'])
    close(pull, arrays[f'ae/{kind}/pull'])
    weighted = (push*torch.tensor(arrays['ae/wpush'])).sum() + (pull*torch.tensor(arrays['ae/wpull'])).sum()
    close_gradient(gradients(weighted, tags)[0], arrays[f'ae/{kind}/grad'])

@pytest.mark.parametrize('kind', ['exp', 'max'])
def test_all_tags_equal_golden(printed, kind):
    _,notes = printed
    tags = torch.full((1, 40), .3, requires_grad=True)
    joints = torch.stack([torch.arange(20), torch.ones(20, dtype=torch.int64)], -1).view(1, 4, 5, 2)
    push,pull = ae_loss(tags, joints, kind)
    expected = notes[f'all_equal_tags_{kind}']
    close(push, expected['push'])
    close(pull, expected['pull'])
    assert gradients((push + pull).sum(), tags)[0].abs().sum() == expected['grad_abs_sum']

def stages(arrays, name, what): return [torch.tensor(arrays[f'full/{name}/s{s}/{what}']) for s in (0, 1)]

FULL = {'yaml_default': {}, 'ae_both_stages_big': dict(ae_stages=(True, True), push_weight=(1., .5), pull_weight=(.25, 2.)),
        'ae_without_heatmap_stage0': dict(heatmap_stages=(False, True))}

@pytest.mark.filterwarnings('ignore:stage 0 has tags')
@pytest.mark.parametrize('name', FULL)
def test_whole_loss_golden(printed, name):
    arrays,notes = printed
    outputs = [o.requires_grad_() for o in stages(arrays, name, 'pred')]
    loss = PoseLoss(17, **FULL[name])
    joints = [torch.tensor(arrays[key]) if (key := f'full/{name}/s{s}/joints') in arrays else None for s in (0, 1)]
    total = loss(outputs, stages(arrays, name, 'hm'), stages(arrays, name, 'mask'), joints)
    close(total, arrays[f'full/{name}/loss'])
    close(total, notes[f'full/{name}']['loss'])
    for s,gradient in enumerate(gradients(total, *outputs)):
        key = f'full/{name}/s{s}/grad'
        if key in arrays: close_gradient(gradient, arrays[key])
        else: assert gradient is None
    for s in (0, 1):      # the printed parts are weighted and one an image
        for part,weights in (('heat', loss.heatmap_weight), ('push', loss.push_weight), ('pull', loss.pull_weight)):
            key,ours = f'full/{name}/s{s}/{part}',{'heat': 'heatmap'}.get(part, part) + f'_s{s}'
            assert (key in arrays) == (ours in loss.parts)
            if key in arrays: close(loss.parts[ours]*weights[s], arrays[key].mean())

def test_original_sum_of_parts(printed):
    "The sum is what the parts and weights say"
    arrays,_ = printed
    loss = PoseLoss(17, **FULL['ae_both_stages_big'])
    total = loss(*(stages(arrays, 'ae_both_stages_big', what) for what in ('pred', 'hm', 'mask', 'joints')))
    close(total, sum(getattr(loss, f'{name[:-3]}_weight')[int(name[-1])]*part.item() for name,part in loss.parts.items()))
    assert set(loss.parts) == {f'{part}_s{s}' for part in ('heatmap', 'push', 'pull') for s in (0, 1)}
    assert not any(part.requires_grad for part in loss.parts.values())

# ---- a plain loop

def plain_ae(tags, joints, kind):
    pushes,pulls = [],[]
    for tag,people in zip(tags, joints):
        means,pull = [],tag.sum()*0
        for person in people:
            values = tag[person[person[:, 1] > 0, 0]]
            if not len(values): continue
            means.append(values.mean())
            pull = pull + ((values - means[-1])**2).mean()
        n,push = len(means),tag.sum()*0
        for i in range(n):
            for j in range(n):
                d = means[i] - means[j]
                if i != j: push = push + (torch.exp(-d**2) if kind == 'exp' else torch.clamp(1 - d.abs(), min=0))
        pushes.append(push/max(1, 2*n*(n-1)))
        pulls.append(pull/max(1, n))
    return torch.stack(pushes), torch.stack(pulls)

def random_places(B, P, K, L, generator, share=.6):
    flag = (torch.rand(B, P, K, generator=generator) < share).long()
    return torch.stack([torch.randint(0, L, (B, P, K), generator=generator)*flag, flag], -1)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(0, 6), st.integers(1, 5), st.sampled_from(['exp', 'max']), st.integers(0, 10**6))
def test_ae_equals_plain(B, P, K, kind, seed):
    g = torch.Generator().manual_seed(seed)
    tags,joints = torch.randn(B, 30, generator=g, dtype=torch.float64).requires_grad_(),random_places(B, P, K, 30, g)
    ours,plain = ae_loss(tags, joints, kind),plain_ae(tags, joints, kind)
    weight = torch.randn(2, B, generator=g, dtype=torch.float64)
    for a,b,w in zip(ours, plain, weight):
        close(a, b.detach(), 1e-12)
        grad = lambda x: torch.autograd.grad((x*w).sum(), tags, retain_graph=True)[0]
        close(grad(a), grad(b), 1e-10)

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(['exp', 'max']))
def test_order_and_padding_do_not_matter(seed, kind):
    g = torch.Generator().manual_seed(seed)
    tags,joints = torch.randn(2, 50, generator=g, dtype=torch.float64),random_places(2, 4, 5, 50, g)
    shuffled = joints[:, torch.randperm(4, generator=g)][:, :, torch.randperm(5, generator=g)]
    padded = torch.cat([shuffled, shuffled.new_zeros(2, 3, 5, 2)], 1)
    for a,b in zip(ae_loss(tags, joints, kind), ae_loss(tags, padded, kind)): close(a, b, 1e-12)

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([0., 5.]))
def test_heatmap_equals_plain(B, K, seed, foreground):
    g = torch.Generator().manual_seed(seed)
    pred,gt = torch.randn(B, K, 5, 7, generator=g).requires_grad_(),torch.rand(B, K, 5, 7, generator=g)
    mask = torch.rand(B, 5, 7, generator=g)          # any mask, not only 0 and 1
    plain = ((pred - gt)**2*(1 + foreground*gt)*mask[:, None]).mean((1, 2, 3))
    ours,weight = heatmap_loss(pred, gt, mask, foreground),torch.randn(B, generator=g)
    close(ours, plain.detach())
    close(gradients((ours*weight).sum(), pred)[0], gradients((plain*weight).sum(), pred)[0])

# ---- gradients

@pytest.mark.parametrize('foreground', [0., 3.])
def test_heatmap_gradcheck(foreground):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)
    pred,gt,mask = draw(2, 3, 4, 4).requires_grad_(),draw(2, 3, 4, 4),draw(2, 4, 4)
    assert torch.autograd.gradcheck(lambda p: heatmap_loss(p, gt, mask, foreground), pred)
    slope, = torch.autograd.grad(heatmap_loss(pred, gt, mask, foreground).sum(), pred, create_graph=True)
    with pytest.raises(RuntimeError, match='does not require grad|differentiate twice'): slope.sum().backward()     # no wrong second derivative

@pytest.mark.parametrize('kind', ['exp', 'max'])
def test_ae_gradcheck(kind):
    g = torch.Generator().manual_seed(3)
    tags,joints = torch.randn(2, 20, generator=g, dtype=torch.float64).requires_grad_(),random_places(2, 4, 3, 20, g)
    assert torch.autograd.gradcheck(lambda t: ae_loss(t, joints, kind), tags)

@pytest.mark.parametrize('tag_per_joint', [True, False])
def test_whole_gradcheck(tag_per_joint):
    g = torch.Generator().manual_seed(0)
    K,sizes = 3,(4, 6)
    outputs = [torch.randn(2, c, r, r, generator=g, dtype=torch.float64).requires_grad_() for c,r in zip((K + (K if tag_per_joint else 1), K), sizes)]
    truth = [torch.rand(2, K, r, r, generator=g, dtype=torch.float64) for r in sizes]
    masks = [torch.ones(2, r, r, dtype=torch.float64) for r in sizes]
    joints = [random_places(2, 3, K, (K if tag_per_joint else 1)*r*r, g) for r in sizes]
    loss = PoseLoss(K, push_weight=.5, pull_weight=.3, tag_per_joint=tag_per_joint)
    assert torch.autograd.gradcheck(lambda *out: loss(out, truth, masks, joints), outputs)

# ---- types, memory formats, channels

def example(B=2, P=3, K=3, sizes=(8, 16), dtype=torch.float32, channels=None):
    g = torch.Generator().manual_seed(0)
    outputs = [torch.randn(B, c, r, r, generator=g).to(dtype).requires_grad_() for c,r in zip(channels or (2*K, K), sizes)]
    return (outputs, [torch.rand(B, K, r, r, generator=g) for r in sizes], [torch.ones(B, r, r) for r in sizes],
            [random_places(B, P, K, K*r*r, g) for r in sizes])

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_outputs(dtype):
    outputs,*truth = example(dtype=dtype)
    total = PoseLoss(3)(outputs, *truth)
    assert total.dtype == torch.float32
    close(total, PoseLoss(3)([o.detach().float() for o in outputs], *truth))
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in gradients(total, *outputs))

def test_under_autocast():
    outputs,*truth = example()
    with torch.autocast('cpu', torch.bfloat16): total = PoseLoss(3)(outputs, *truth)
    close(total, PoseLoss(3)(outputs, *truth).detach())

def test_channels_last_outputs():
    outputs,*truth = example()
    last = [o.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for o in outputs]
    a,b = PoseLoss(3)(outputs, *truth),PoseLoss(3)(last, *truth)
    close(a, b.detach())
    for x,y in zip(gradients(a, *outputs), gradients(b, *last)): close(x, y)

def test_channels_beyond_are_left_out():
    "Tags of a stage without AE loss get no gradient"
    outputs,*truth = example(channels=(6, 6))
    total = PoseLoss(3)(outputs, *truth)
    close(total, PoseLoss(3)([outputs[0], outputs[1][:, :3]], *truth).detach())
    assert not gradients(total, *outputs)[1][:, 3:].any()

def test_int32_and_int64_places():
    outputs,gt,masks,joints = example()
    close(PoseLoss(3)(outputs, gt, masks, joints), PoseLoss(3)(outputs, gt, masks, [j.int() for j in joints]).detach())

@pytest.mark.gpu
def test_gpu_equals_cpu():
    outputs,*truth = example()
    there = [[t.detach().cuda() for t in group] for group in (outputs, *truth)]
    there[0] = [t.requires_grad_() for t in there[0]]
    a,b = PoseLoss(3)(outputs, *truth),PoseLoss(3)(*there)
    close(a, b.detach().cpu())
    for x,y in zip(gradients(a, *outputs), gradients(b, *there[0])): close(x, y.cpu())

# ---- nobody

@pytest.mark.parametrize('P', [0, 1, 4])
def test_nobody(P):
    outputs,gt,masks,joints = example(P=P)
    loss = PoseLoss(3)
    total = loss(outputs, gt, masks, [torch.zeros_like(j) for j in joints])
    assert total.isfinite() and loss.parts['push_s0'] == loss.parts['pull_s0'] == 0
    first,second = gradients(total, *outputs)
    assert first.isfinite().all() and second.isfinite().all() and not first[:, 3:].any()

def test_one_person_is_pulled_but_not_pushed():
    tags = torch.tensor([[0., 2, 5]], requires_grad=True)
    push,pull = ae_loss(tags, torch.tensor([[[[0, 1], [1, 1]], [[0, 0], [0, 0]]]]))
    assert push == 0 and pull == 1
    assert gradients(push.sum() + pull.sum(), tags)[0].tolist() == [[-1, 1, 0]]

def test_empty_batch():
    assert heatmap_loss(torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 4, 4), torch.zeros(0, 4, 4)).shape == (0,)
    push,pull = ae_loss(torch.zeros(0, 9), torch.zeros(0, 2, 3, 2, dtype=torch.int64))
    assert push.shape == pull.shape == (0,)
    with pytest.raises(ValueError, match='empty'): PoseLoss(3)(*example(B=0))

def test_everything_masked():
    outputs,gt,masks,joints = example()
    loss = PoseLoss(3)
    loss(outputs, gt, [m*0 for m in masks], joints)
    assert loss.parts['heatmap_s0'] == loss.parts['heatmap_s1'] == 0

# ---- bad input

def test_bad_settings():
    with pytest.raises(ValueError, match='one length'): PoseLoss(heatmap_stages=(True,))
    with pytest.raises(ValueError, match='nothing to train'): PoseLoss(heatmap_stages=(False, False))
    with pytest.raises(ValueError, match="'exp' or 'max'"): PoseLoss(ae_type='mean')
    with pytest.raises(ValueError, match='pull_weight'): PoseLoss(pull_weight=(1, 2, 3))

def test_tags_without_heatmaps_warn():
    with pytest.warns(UserWarning, match='stage 0 has tags but no heatmap loss'): PoseLoss(heatmap_stages=(False, True))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        PoseLoss()

def test_bad_shapes():
    outputs,gt,masks,joints = example()
    loss = PoseLoss(3)
    with pytest.raises(ValueError, match='2 stages need 2 outputs'): loss(outputs[:1], gt, masks, joints)
    with pytest.raises(ValueError, match=r'outputs\[0\]: 4 heatmaps and 4 tag maps are needed, got 6 channels'): PoseLoss(4)(outputs, gt, masks, joints)
    with pytest.raises(ValueError, match='do not fit together'): loss(outputs, gt[::-1], masks, joints)
    with pytest.raises(ValueError, match='do not fit together'): loss(outputs, gt, masks[::-1], joints)

def test_functions_alone():
    mean,spread,there = person_tags(torch.tensor([[1., 3, 9]]), torch.tensor([[[[0, 1], [1, 1]], [[2, 1], [0, 0]], [[0, 0], [0, 0]]]]))
    assert (mean.tolist(), spread.tolist(), there.tolist()) == ([[2, 9, 0]], [[1, 0, 0]], [[1, 1, 0]])
    close(push_loss(mean, there), [.5*np.exp(-49)])
    assert push_loss(mean*0, there).tolist() == [.5]
