"Targets: equal to the original's numbers, to a plain loop, and one sample equal to a batch"
import json, math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from posenb.augment import RandomAffine
from posenb.dataset import pose_collate
from posenb.skeleton import COCO
from posenb.targets import (HeatmapGenerator, JointsGenerator, PoseTargets, ScaleAwareHeatmapGenerator,
                            draw_heatmaps, gaussian, joint_indices, joint_pixels, normalize)

CASES = ['empty', 'one_invisible', 'centre_integer', 'fractional', 'visibility', 'overlap_max', 'many_30', 'tiny_res_32']

@pytest.fixture(scope='module')
def printed(golden): return np.load(golden('targets.npz')), json.loads(golden('targets.json').read_text())['cases']

# ---- the original's numbers, bit for bit

@pytest.mark.parametrize('case', CASES)
def test_heatmaps_golden(printed, case):
    arrays,cases = printed
    joints,res = arrays[f'{case}/joints'],cases[case]['res']
    for name,sigma in cases[case]['sigmas'].items():
        generate = HeatmapGenerator(res, 17, float(name))
        assert generate.sigma == sigma
        maps = generate(joints)
        assert maps.dtype == torch.float32
        np.testing.assert_array_equal(maps, arrays[f'{case}/hm_sigma{name}'])

@pytest.mark.parametrize('case', CASES)
def test_scale_aware_golden(printed, case):
    arrays,cases = printed
    maps = ScaleAwareHeatmapGenerator(cases[case]['res'], 17)(arrays[f'{case}/joints4'])
    np.testing.assert_array_equal(maps, arrays[f'{case}/hm_scaleaware'])

@pytest.mark.parametrize('tag_per_joint', [True, False])
@pytest.mark.parametrize('case', CASES)
def test_joint_indices_golden(printed, case, tag_per_joint):
    arrays,cases = printed
    rows = JointsGenerator(30, 17, cases[case]['res'], tag_per_joint)(arrays[f'{case}/joints'])
    assert rows.dtype == torch.int32
    np.testing.assert_array_equal(rows, arrays[f'{case}/jg_tpj{int(tag_per_joint)}'])

def test_kernels_golden(printed):
    arrays,_ = printed
    for name in [n for n in arrays.files if n.startswith('kernel/')]:
        sigma = float(name.removeprefix('kernel/sigma'))
        d = torch.arange(0, 6*sigma + 3, dtype=torch.float64)[None] - (3*sigma + 1)
        np.testing.assert_allclose(gaussian(d, d.mT, sigma), arrays[name], rtol=1e-15)

def test_more_people_than_rows(printed):
    "Where the original stops with an IndexError the first rows are kept"
    arrays,cases = printed
    assert 'IndexError' in cases['more_people_than_max']
    joints = arrays['many_30/joints']
    np.testing.assert_array_equal(JointsGenerator(3, 17, 128)(joints), arrays['many_30/jg_tpj1'][:3])
    assert JointsGenerator(40, 17, 128)(joints).shape == (40, 17, 2)

# ---- a plain loop

def plain_heatmaps(joints, res, sigmas):
    "Heatmaps (K, res, res), pixel square after pixel square, one sigma a person"
    maps = np.zeros((joints.shape[1], res, res), np.float32)
    for person,s in zip(joints, sigmas):
        d = np.arange(0, 6*s + 3) - (3*s + 1)
        kernel = np.exp(-(d**2 + d[:, None]**2)/(2*s**2))
        for k,(x,y,v) in enumerate(person[:, :3]):
            if not v > 0 or not abs(x) < 1e6 or not abs(y) < 1e6: continue
            x,y = int(x),int(y)
            if not (0 <= x < res and 0 <= y < res): continue
            x0,y0,x1,y1 = (int(np.round(c)) for c in (x-3*s-1, y-3*s-1, x+3*s+2, y+3*s+2))
            for row in range(max(y0, 0), min(y1, res)):
                for col in range(max(x0, 0), min(x1, res)):
                    maps[k, row, col] = max(maps[k, row, col], np.float32(kernel[row-y0, col-x0]))
    return maps

def plain_indices(joints, res, tag_per_joint):
    rows = np.zeros((*joints.shape[:2], 2), int)
    for p,person in enumerate(joints):
        slot = 0
        for k,(x,y,v) in enumerate(person):
            if not v > 0 or not abs(x) < 1e6 or not abs(y) < 1e6: continue
            x,y = int(x),int(y)
            if not (0 <= x < res and 0 <= y < res): continue
            rows[p, slot] = k*tag_per_joint*res*res + y*res + x,1
            slot += 1
    return rows

coordinate = st.one_of(st.floats(-3, 23, width=32), st.sampled_from([0., -.5, -.99, -1., 19., 19.999, 20., 1e20, -1e20]), st.integers(-2, 21).map(float))

@st.composite
def people(draw, batch=None, most=3, k=3):
    "Joints (P, K, 3), or (B, P, K, 3), in and around a map of 20"
    shape = (() if batch is None else (draw(st.integers(1, batch)),)) + (draw(st.integers(0, most)), k)
    xy = draw(arrays(np.float32, (*shape, 2), elements=coordinate.map(np.float32)))
    v = draw(arrays(np.float32, (*shape, 1), elements=st.sampled_from([0, 1, 2])))
    return np.concatenate([xy, v], -1)

@settings(max_examples=60, deadline=None)
@given(people(), st.sampled_from([.5, .6, .8, 2.5/3, 1., 1.5, 2., 2.6]))
def test_heatmaps_equal_plain(joints, sigma):
    np.testing.assert_array_equal(HeatmapGenerator(20, 3, sigma)(joints), plain_heatmaps(joints, 20, [sigma]*len(joints)))

@settings(max_examples=30, deadline=None)
@given(people(), st.lists(st.floats(.4, 3), min_size=3, max_size=3))
def test_scale_aware_equal_plain(joints, sigmas):
    sigmas = np.array(sigmas)[:len(joints)]
    joints = np.concatenate([joints, np.broadcast_to(sigmas[:, None, None], (*joints.shape[:2], 1))], -1)
    np.testing.assert_array_equal(ScaleAwareHeatmapGenerator(20, 3)(joints), plain_heatmaps(joints, 20, sigmas))

@settings(max_examples=100, deadline=None)
@given(people(), st.booleans())
def test_indices_equal_plain(joints, tag_per_joint):
    np.testing.assert_array_equal(joint_indices(torch.tensor(joints)[None], 20, tag_per_joint)[0], plain_indices(joints, 20, tag_per_joint))

# ---- a batch is its samples

@settings(max_examples=60, deadline=None)
@given(people(batch=3), st.sampled_from(['original', 'unbiased']), st.sampled_from([.8, 1.5, 2]))
def test_batch_equals_samples(joints, convention, sigma):
    batch = torch.tensor(joints)
    maps,rows = draw_heatmaps(batch, 20, sigma, convention),joint_indices(batch, 20, True, convention)
    assert maps.shape == (len(batch), 3, 20, 20) and maps.dtype == torch.float32
    for m,r,j in zip(maps, rows, joints):
        assert torch.equal(m, HeatmapGenerator(20, 3, sigma, convention)(j))
        assert torch.equal(r.int(), JointsGenerator(len(j), 3, 20, True, convention)(j))

@settings(max_examples=30, deadline=None)
@given(people(batch=2), st.integers(1, 4))
def test_padding_changes_nothing(joints, more):
    batch = torch.tensor(joints)
    padded = torch.cat([batch, batch.new_zeros(len(batch), more, 3, 3)], 1)
    assert torch.equal(draw_heatmaps(batch, 20), draw_heatmaps(padded, 20))
    assert torch.equal(joint_indices(batch, 20), joint_indices(padded, 20)[:, :batch.shape[1]])

def test_sigma_per_person_of_a_batch():
    rng = np.random.default_rng(0)
    joints = torch.tensor(np.concatenate([rng.uniform(-2, 34, (2, 4, 5, 2)), np.ones((2, 4, 5, 1))], -1))
    sigma = torch.tensor(rng.uniform(.5, 3, (2, 4)))
    for m,j,s in zip(draw_heatmaps(joints, 32, sigma), joints.numpy(), sigma.numpy()): np.testing.assert_array_equal(m, plain_heatmaps(j, 32, s))

@pytest.mark.gpu
@pytest.mark.parametrize('convention', ['original', 'unbiased'])
def test_gpu_equals_cpu(convention):
    rng = np.random.default_rng(0)
    joints = torch.tensor(np.concatenate([rng.uniform(-9, 70, (4, 6, 17, 2)), rng.integers(0, 3, (4, 6, 17, 1))], -1), dtype=torch.float32)
    difference = (draw_heatmaps(joints.cuda(), 64, 2, convention).cpu() - draw_heatmaps(joints, 64, 2, convention)).abs().max()
    assert difference == 0 if convention == 'original' else difference < 1e-6
    assert torch.equal(joint_indices(joints.cuda(), 64, True, convention).cpu(), joint_indices(joints, 64, True, convention))

# ---- between pixels

@settings(max_examples=60, deadline=None)
@given(people(most=2))
def test_unbiased_is_the_gaussian_at_the_joint(joints):
    maps = HeatmapGenerator(20, 3, 2, 'unbiased')(joints).numpy()
    grid = np.arange(20)
    expected = np.zeros_like(maps)
    for person in joints.astype(np.float64):
        for k,(x,y,v) in enumerate(person):
            if v > 0 and -.5 <= x < 19.5 and -.5 <= y < 19.5:
                g = np.exp(-((grid - x)**2 + (grid[:, None] - y)**2)/8)
                near = (abs(grid - np.floor(x + .5)) <= 7) & (abs(grid[:, None] - np.floor(y + .5)) <= 7)
                expected[k] = np.maximum(expected[k], g*near)
    np.testing.assert_allclose(maps, expected, atol=2e-6)

def test_unbiased_pixel_is_the_nearest():
    joints = torch.tensor([[-.5, 0, 1], [-.51, 0, 1], [19.49, 3.5, 2], [19.5, 0, 1]])
    pixel,seen = joint_pixels(joints, 20, 'unbiased')
    assert seen.tolist() == [True, False, True, False] and pixel.tolist() == [[0, 0], [0, 0], [19, 4], [0, 0]]

# ---- bad input

def test_bad_joints():
    joints = np.ones((2, 17, 3))
    with pytest.raises(ValueError, match=r'shape \(people, 14, 3\) is needed, got \(2, 17, 3\)'): HeatmapGenerator(64, 14)(joints)
    with pytest.raises(ValueError, match='shape'): JointsGenerator(30, 17, 64)(joints[0])
    joints[1, 4, 0] = math.nan
    for generate in (HeatmapGenerator(64, 17), JointsGenerator(30, 17, 64)):
        with pytest.raises(ValueError, match='person 1, joint 4'): generate(joints)
    joints[1, 4, 2] = 0          # not labelled: its place does not matter
    assert HeatmapGenerator(64, 17)(joints).isfinite().all()

def test_bad_settings():
    with pytest.raises(ValueError, match='sigma'): HeatmapGenerator(64, 17, 0)
    with pytest.raises(ValueError, match="'original' or 'unbiased'"): HeatmapGenerator(64, 17, 2, 'udp')(np.ones((1, 17, 3)))
    with pytest.raises(ValueError, match='sigma'): ScaleAwareHeatmapGenerator(64, 17)(np.concatenate([np.ones((1, 17, 3)), np.zeros((1, 17, 1))], -1))

def test_nan_in_a_batch_counts_as_outside():
    joints = torch.ones(1, 1, 1, 3)
    joints[..., 0] = math.nan
    assert draw_heatmaps(joints, 16).sum() == 0 and joint_indices(joints, 16).sum() == 0

# ---- the whole batch

def example(B=2, P=3, K=5, sizes=(16, 32), size=64):
    rng = np.random.default_rng(0)
    joints = [torch.tensor(np.concatenate([rng.uniform(0, r, (B, P, K, 2)), rng.integers(0, 3, (B, P, K, 1))], -1), dtype=torch.float32) for r in sizes]
    return torch.tensor(rng.integers(0, 256, (B, 3, size, size)), dtype=torch.uint8), [torch.ones(B, r, r, dtype=torch.uint8) for r in sizes], joints

@pytest.mark.parametrize('convention', ['original', 'unbiased'])
def test_pose_targets(convention):
    images,masks,joints = example()
    inputs,heatmaps,float_masks,rows = PoseTargets((16, 32), 5, sigma=-1, tag_per_joint=False, convention=convention)((images, masks, joints))
    mean,std = (torch.tensor(t)[:, None, None] for t in ((.485, .456, .406), (.229, .224, .225)))
    assert torch.equal(inputs, (images.float()/255 - mean)/std)
    for r,m,mask,row,j in zip((16, 32), heatmaps, float_masks, rows, joints):
        assert torch.equal(m, draw_heatmaps(j, r, r/64, convention)) and torch.equal(row, joint_indices(j, r, False, convention))
        assert mask.dtype == torch.float32 and mask.shape == (2, r, r) and (mask == 1).all()

def test_pose_targets_keeps_its_input():
    images,masks,joints = example()
    copy = images.clone(), [j.clone() for j in joints]
    PoseTargets((16, 32), 5)((images, masks, joints))
    assert torch.equal(images, copy[0]) and all(map(torch.equal, joints, copy[1]))

def test_channels_last():
    images,masks,joints = example()
    one = PoseTargets((16, 32), 5)((images, masks, joints))[0]
    other = PoseTargets((16, 32), 5, channels_last=True)((images, masks, joints))[0]
    assert torch.equal(one, other) and other.is_contiguous(memory_format=torch.channels_last) and one.is_contiguous()

@pytest.mark.parametrize('B,P', [(2, 0), (0, 3), (0, 0)])
def test_nobody(B, P):
    inputs,heatmaps,_,rows = PoseTargets((16, 32), 5)(example(B, P))
    assert inputs.shape == (B, 3, 64, 64) and heatmaps[1].shape == (B, 5, 32, 32) and rows[0].shape == (B, P, 5, 2)
    assert not any(h.any() for h in heatmaps)

def test_sizes_are_checked():
    images,masks,joints = example()
    with pytest.raises(ValueError, match=r'shape \(B, 24, 24\) is needed for size 24'): PoseTargets((16, 24), 5)((images, masks, joints))
    with pytest.raises(ValueError, match=r'shape \(B, P, 6, 3\)'): PoseTargets((16, 32), 6)((images, masks, joints))
    with pytest.raises(ValueError, match='as many masks and joints'): PoseTargets((16, 32), 5)((images, masks[:1], joints))

def test_other_channels_and_statistics():
    images = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    assert normalize(images, (0, .5, 1), (1, .5, 2)).amax((0, 2, 3)).tolist() == [1, 1, 0]

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(30, 200), st.integers(30, 200)), min_size=1, max_size=4), st.integers(0, 99), st.sampled_from(['original', 'unbiased']), st.booleans())
def test_a_sample_has_the_same_targets_beside_larger_ones(shapes, seed, convention, tag_per_joint):
    "Inputs that have the shape of their images are filled up in a batch"
    rng = np.random.default_rng(seed)
    affine = RandomAffine(64, flip_index=COCO.flip_index, convention=convention, square=False)
    def one(w, h):
        people = rng.integers(0, 4)
        joints = np.concatenate([rng.uniform(-.2, 1.2, (people, 17, 2))*[w, h], rng.integers(0, 3, (people, 17, 1))], -1)
        image,masks,joints = affine(rng.integers(0, 256, (h, w, 3), np.uint8), rng.random((h, w)) < .5, joints, affine.draw(rng, w, h))
        return torch.from_numpy(image).permute(2, 0, 1), [torch.from_numpy(m) for m in masks], [torch.from_numpy(j.astype(np.float32)) for j in joints]
    samples,targets = [one(*shape) for shape in shapes],PoseTargets(affine.out_sizes, 17, tag_per_joint=tag_per_joint, convention=convention)
    images,heatmaps,masks,indices = targets(pose_collate(samples))
    for i,sample in enumerate(samples):
        image,own_maps,own_masks,own_indices = targets(pose_collate([sample]))
        height,width = image.shape[2:]
        assert torch.equal(images[i, :, :height, :width], image[0])
        for maps,own,mask,own_mask,rows,own_rows in zip(heatmaps, own_maps, masks, own_masks, indices, own_indices):
            H,W = maps.shape[2:]
            h,w = own.shape[2:]
            inside = torch.zeros(H, W, dtype=bool)
            inside[:h, :w] = True
            assert torch.equal(maps[i, :, :h, :w], own[0]) and torch.equal(mask[i][:h, :w], own_mask[0]) and not mask[i][~inside].any()
            place,flag = rows[i, :own_rows.shape[1]].unbind(-1)
            there = (place//(H*W))*h*w + place % (H*W)//W*w + place % W
            assert torch.equal(torch.stack([there, flag], -1), own_rows[0]) and not rows[i, own_rows.shape[1]:].any()
