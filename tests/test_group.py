"Grouping: the original's people in every mode, munkres 1.1's ties, any number of joints and tags, clear errors on bad maps"
import json
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from munkres import Munkres
from scipy.optimize import linear_sum_assignment
from posenb.group import _best_pixel, _best_pixels, _top_k_torch, adjust_peaks, assign, group, match_by_tag, munkres, nms, refine_poses, top_k
from posenb.skeleton import COCO, CROWDPOSE, Skeleton

def skeleton(n): return Skeleton([f'joint{i}' for i in range(n)], [], [], [.05]*n)

def same_people(found, poses, scores):
    assert found[0].shape == poses.shape and found[1].shape == scores.shape
    np.testing.assert_allclose(found[0], poses, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[1], scores, rtol=0, atol=1e-6)

# ---- the original's people

cases = ['empty', 'all_below_threshold', 'one_person', 'one_person_missing_joints', 'two_people', 'identical_tags', 'five_people', 'fifteen_people',
         'fortyfive_people', 'noise_random_tags', 'noise_zero_tags', 'equal_peak_values', 'plateaus', 'no_flip_T1', 'use_detection_val_false',
         'tag_threshold_big', 'detection_threshold_high', 'nms_3_1', 'with_center_ignored', 'negative_background', 'tall_map']
topk_order_matters = ['noise_random_tags', 'noise_zero_tags', 'equal_peak_values', 'plateaus']
argument = {'TEST.USE_DETECTION_VAL': 'use_detection_val', 'TEST.TAG_THRESHOLD': 'tag_threshold',
            'TEST.DETECTION_THRESHOLD': 'detection_threshold', 'TEST.NMS_KERNEL': 'nms_kernel'}
modes = [(adjust, refine) for adjust in (True, False) for refine in (True, False)]

@pytest.fixture(scope='module')
def printed(golden): return np.load(golden('parser.npz')), json.loads(golden('parser.json').read_text())['cases']

def options(notes): return {argument[k]: v for k,v in notes['opts'].items() if k in argument}

def test_all_cases_are_listed(printed): assert set(cases) == set(printed[1])

@pytest.mark.parametrize('adjust,refine', modes)
@pytest.mark.parametrize('case', cases)
def test_golden(printed, case, adjust, refine):
    arrays,notes = printed
    if case in topk_order_matters:
        places = _top_k_torch(nms(arrays[f'{case}/det'][0].astype(np.float32)), arrays[f'{case}/tag'][0], 30)[1]
        if (places != arrays[f'{case}/loc_k'][0]).any(): pytest.skip('this torch.topk orders equal values in another way')
    want = f'{case}/adjust{int(adjust)}_refine{int(refine)}/'
    found = group(arrays[f'{case}/det'][0], arrays[f'{case}/tag'][0], adjust=adjust, refine=refine, solver='munkres', **options(notes[case]))
    same_people(found, arrays[want + 'ans'], arrays[want + 'scores'])

@pytest.mark.parametrize('adjust,refine', modes)
@pytest.mark.parametrize('case', topk_order_matters)
def test_golden_from_its_peaks(printed, case, adjust, refine):
    "The order in which torch.topk gives equal values may change with its version, so these start from the peaks"
    arrays,notes = printed
    want = f'{case}/adjust{int(adjust)}_refine{int(refine)}/'
    heat,tags = (arrays[f'{case}/{name}'][0].astype(np.float32) for name in ('det', 'tag'))
    val_k,loc_k,tag_k = (arrays[f'{case}/{name}'][0] for name in ('val_k', 'loc_k', 'tag_k'))
    xy = adjust_peaks(heat, np.arange(17)[:, None], loc_k) if adjust else loc_k
    poses = match_by_tag(val_k, xy, tag_k, solver='munkres', **options(notes[case]))
    scores = poses[..., 2].mean(1)
    same_people((refine_poses(poses, heat, tags) if refine else poses, scores), arrays[want + 'ans'], arrays[want + 'scores'])

@pytest.mark.parametrize('case', ['five_people', 'fifteen_people', 'no_flip_T1', 'nms_3_1', 'tall_map'])
def test_peaks_golden(printed, case):
    arrays,notes = printed
    kernel = options(notes[case]).get('nms_kernel', 5)
    heat,tags = (arrays[f'{case}/{name}'][0].astype(np.float32) for name in ('det', 'tag'))
    val_k,loc_k,tag_k = top_k(nms(heat, kernel), tags, 30)
    there = val_k > .1              # the noise below has equal values
    np.testing.assert_array_equal(val_k, arrays[f'{case}/val_k'][0].clip(0))
    np.testing.assert_array_equal(loc_k[there], arrays[f'{case}/loc_k'][0][there])
    np.testing.assert_array_equal(tag_k[there], arrays[f'{case}/tag_k'][0][there])

@pytest.mark.parametrize('case', ['one_person', 'two_people', 'no_flip_T1', 'tall_map'])
def test_default_solver_agrees_where_nothing_ties(printed, case):
    arrays,_ = printed
    found = group(arrays[f'{case}/det'][0], arrays[f'{case}/tag'][0])
    want,scores = arrays[f'{case}/adjust1_refine1/ans'],arrays[f'{case}/adjust1_refine1/scores']
    assert len(found[0]) == len(want)
    order = lambda poses: np.lexsort(poses.reshape(len(poses), -1).T)
    same_people([x[order(found[0])] for x in found], want[order(want)], scores[order(want)])

# ---- the assignment of munkres 1.1

def tied_costs(rng):
    "Costs as they are in grouping: multiples of 100, minus a height that is constant along a row; columns for nobody"
    rows,columns = rng.integers(1, 12, 2)
    cost = 100.*rng.integers(0, rng.integers(2, 5), (rows, columns))
    height = rng.random((rows, 1)).astype(np.float32)
    cost -= [0, height, np.round(height, 1)][rng.integers(3)]
    return np.pad(cost, ((0, 0), (0, max(0, rows - columns))), constant_values=1e10)

def test_munkres_equals_the_package_on_ties():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        cost = tied_costs(rng)
        assert munkres(cost).tolist() == [column for _,column in sorted(Munkres().compute(cost.tolist()))]

@given(st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(st.floats(-100, 100), min_size=n, max_size=n), min_size=1, max_size=n)))
@settings(max_examples=100, deadline=None)
def test_munkres_least_cost(rows):
    cost = np.array(rows)
    before = cost.copy()
    columns = munkres(cost)
    np.testing.assert_array_equal(cost, before)
    assert len(set(columns)) == len(cost)
    best = cost[linear_sum_assignment(cost)].sum()
    np.testing.assert_allclose(cost[np.arange(len(cost)), columns].sum(), best, atol=1e-6)

def test_munkres_errors():
    with pytest.raises(ValueError, match='3 rows and 2 columns'): munkres(np.zeros((3, 2)))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match='finite'): munkres(np.array([[0, bad], [1, 2]]))

@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 999), st.booleans(), st.sampled_from(['scipy', 'munkres']))
@settings(max_examples=100, deadline=None)
def test_assign_is_a_matching(a, g, seed, use_detection_val, solver):
    rng = np.random.default_rng(seed)
    distance = rng.uniform(0, 2, (a, g))
    person = assign(distance, rng.random(a), use_detection_val=use_detection_val, solver=solver)
    matched = person[person >= 0]
    assert person.shape == (a,) and len(set(matched)) == len(matched)
    assert (distance[person >= 0, matched] < 1).all()
    if solver == 'scipy' and (distance < 1).any(): assert len(matched)

# ---- drawn people

def draw(rng, n_people, n_joints, n_tags=2, size=(64, 80), missing=.15, shared=False):
    "Maps of people with tags 2 apart, joints of one map (with shared tags: all joints) far from each other; joints (P, K, 2) and which are drawn (P, K)"
    cells = np.stack(np.meshgrid(np.arange(8, size[1]-6, 14), np.arange(8, size[0]-6, 14)), -1).reshape(-1, 2)
    heat,tags = np.zeros((n_joints, *size), np.float32),np.zeros((n_joints, *size, n_tags), np.float32)
    places = np.stack([rng.permutation(cells)[:n_people] for _ in range(n_joints)], 1) + rng.integers(-2, 3, (n_people, n_joints, 2))
    if shared: places = rng.permutation(cells)[:n_joints*n_people].reshape(n_people, n_joints, 2)
    there = rng.random((n_people, n_joints)) > missing
    there[:, 0] = True
    ys,xs = np.mgrid[:size[0], :size[1]]
    for p,k in np.argwhere(there):
        square = (xs - places[p, k, 0])**2 + (ys - places[p, k, 1])**2
        heat[k] = np.maximum(heat[k], rng.uniform(.3, 1)*np.exp(-square/8))
        tags[slice(None) if shared else k, square <= 25] = 2*p + 1 + rng.normal(0, .05, n_tags)
    return heat, tags[:1] if shared else tags, places, there

def are_those(poses, places, there):
    "Each found person is one of the drawn ones, all its joints where they were drawn"
    assert len(poses) == len(places)
    who = [np.abs(places[:, 0] + .5 - pose[0, :2]).sum(1).argmin() for pose in poses]
    assert sorted(who) == list(range(len(places)))
    np.testing.assert_array_equal(poses[..., 2] > 0, there[who])
    assert np.abs(poses[..., :2] - places[who] - .5)[there[who]].max(initial=0) <= .25

@given(st.integers(1, 5), st.integers(1, 25), st.integers(1, 3), st.booleans(), st.sampled_from(['scipy', 'munkres']), st.integers(0, 9999))
@settings(max_examples=40, deadline=None)
def test_finds_the_drawn_people(n_people, n_joints, n_tags, shared, solver, seed):
    rng = np.random.default_rng(seed)
    shared = shared and n_people*n_joints <= 20
    heat,tags,places,there = draw(rng, n_people, n_joints, n_tags, shared=shared)
    poses,scores = group(heat, tags, skeleton(n_joints), refine=False, solver=solver)
    assert poses.shape == (n_people, n_joints, 3 + n_tags) and poses.dtype == scores.dtype == np.float32
    are_those(poses, places, there)
    np.testing.assert_allclose(scores, poses[..., 2].mean(1))
    refined,scores_refined = group(heat, tags, skeleton(n_joints), solver=solver)
    np.testing.assert_array_equal(refined[poses[..., 2] > 0], poses[poses[..., 2] > 0])
    np.testing.assert_array_equal(scores, scores_refined)

@given(st.integers(2, 5), st.integers(0, 9999))
@settings(max_examples=20, deadline=None)
def test_order_of_people_does_not_matter(n_people, seed):
    "Other tags for the same people: the same set of poses"
    rng = np.random.default_rng(seed)
    heat,tags,_,_ = draw(rng, n_people, 17)
    order = rng.permutation(n_people)
    person = np.rint((tags - 1)/2).astype(int).clip(0, n_people-1)
    renamed = np.where(tags == 0, 0, tags + 2*(order[person] - person)).astype(np.float32)
    sets = [{pose[:, :3].tobytes() for pose in group(heat, t, refine=False)[0]} for t in (tags, renamed)]
    assert sets[0] == sets[1]

@given(st.integers(0, 9999), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_kinds_of_arrays_give_the_same(seed, crowd):
    rng = np.random.default_rng(seed)
    heat,tags,_,_ = draw(rng, 1 + crowd, 14)
    want = group(heat, tags, CROWDPOSE)
    planes = torch.tensor(np.moveaxis(tags, -1, 0).copy()).movedim(0, -1)
    for h,t in [(torch.tensor(heat), torch.tensor(tags)), (torch.tensor(heat, requires_grad=True), planes), (heat.astype(float), tags.astype(float)),
                (np.asfortranarray(heat), tags), (heat[::-1].copy()[::-1], tags)]:
        for a,b in zip(group(h, t, CROWDPOSE), want): np.testing.assert_array_equal(a, b)

def on_tensors(heat, tags, **kw):
    "The steps of `group` with tensors, as on a device"
    heat,tags = torch.as_tensor(heat),torch.as_tensor(tags)
    val_k,loc_k,tag_k = top_k(nms(heat), tags, 30, .1)
    return refine_poses(match_by_tag(val_k, adjust_peaks(heat, np.arange(len(heat))[:, None], loc_k), tag_k, **kw), heat, tags)

def test_tensor_path_is_the_same():
    rng = np.random.default_rng(0)
    for n in (0, 1, 3, 6):
        heat,tags,_,_ = draw(rng, n, 17, missing=.3)
        heat += .002*rng.standard_normal(heat.shape, np.float32)
        np.testing.assert_array_equal(on_tensors(heat, tags), group(heat, tags)[0])

@pytest.mark.gpu
@pytest.mark.parametrize('convention', ['original', 'unbiased'])
def test_cuda_is_the_same(convention):
    rng = np.random.default_rng(0)
    for n in (0, 3, 6):
        heat,tags,_,_ = draw(rng, n, 17, missing=.3)
        here = group(heat, tags, convention=convention)
        there = group(torch.tensor(heat).cuda(), torch.tensor(tags).cuda(), convention=convention)
        for a,b in zip(here, there): np.testing.assert_allclose(a, b, atol=1e-5)

# ---- peaks and places

@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3, 5, 7]), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_nms_of_arrays_and_tensors(H, W, kernel, seed):
    heat = np.random.default_rng(seed).integers(-3, 4, (2, H, W)).astype(np.float32)
    pool = torch.nn.functional.max_pool2d(torch.tensor(heat), kernel, 1, kernel//2)
    want = heat*(pool.numpy() == heat)
    np.testing.assert_array_equal(nms(heat, kernel), want)
    np.testing.assert_array_equal(nms(torch.tensor(heat), kernel).numpy(), want)

@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_top_k_is_a_stable_sort(H, W, k, seed):
    rng = np.random.default_rng(seed)
    heat = rng.integers(0, 4, (3, H, W)).astype(np.float32)
    val_k,loc_k,tag_k = top_k(heat, rng.random((3, H, W, 2)), k)
    for values,places,plane in zip(val_k, loc_k, heat.reshape(3, -1)):
        order = np.argsort(-plane, kind='stable')[:k]
        order = order[plane[order] > 0]
        np.testing.assert_array_equal(values[:len(order)], plane[order])
        np.testing.assert_array_equal(places[:len(order)] @ [1, W], order)
        assert not values[len(order):].any()

@given(st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_one_peak_a_plateau(seed):
    "Boxes of equal height with room between them: one peak each, whatever their size"
    rng = np.random.default_rng(seed)
    heat = np.zeros((2, 40, 40), np.float32)
    for y in (5, 25):
        for x in (5, 25): heat[:, y:y+rng.integers(1, 6), x:x+rng.integers(1, 6)] = rng.uniform(.2, 1)
    val_k,loc_k,_ = top_k(nms(heat), np.zeros((2, 40, 40, 1)), apart=2)
    assert ((val_k > 0).sum(1) == 4).all()
    assert {tuple(p) for p in loc_k[val_k > 0].tolist()} == {(5, 5), (5, 25), (25, 5), (25, 25)}

@given(st.floats(3, 20), st.floats(3, 20), st.floats(1.2, 3.5), st.floats(.15, 1))
@settings(max_examples=60, deadline=None)
def test_unbiased_is_exact_for_gaussians(x, y, sigma, height):
    ys,xs = np.mgrid[:24, :24]
    heat = (height*np.exp(-((xs-x)**2 + (ys-y)**2)/(2*sigma**2)))[None]
    pixel = np.array(np.unravel_index(heat.argmax(), heat.shape)[:0:-1])
    np.testing.assert_allclose(adjust_peaks(heat, np.array(0), pixel, 'unbiased'), [x, y], atol=1e-4)

@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9999))
@settings(max_examples=100, deadline=None)
def test_unbiased_stays_near_any_pixel(H, W, seed):
    "Noise, plateaus, negative values, borders, maps of one pixel: finite, at most a pixel away, never outside"
    rng = np.random.default_rng(seed)
    heat = rng.choice([-1., 0, 1e-30, .5, .5, 1, 1e30], (1, H, W)).astype(np.float32)
    xy = np.stack(np.meshgrid(np.arange(W), np.arange(H)), -1)
    place = adjust_peaks(heat, np.array(0), xy, 'unbiased')
    assert np.isfinite(place).all() and (np.abs(place - xy) <= 1).all()
    assert (place >= 0).all() and (place <= [W-1, H-1]).all()

def test_unbiased_group_finds_places_between_pixels():
    ys,xs = np.mgrid[:48, :48]
    true = np.random.default_rng(0).uniform(10, 38, (17, 2))
    true[3] = 20.5, 30                                    # a plateau of two pixels: one peak
    heat = np.exp(-((xs - true[:, 0, None, None])**2 + (ys - true[:, 1, None, None])**2)/8).astype(np.float32)
    poses,_ = group(heat, np.ones((17, 48, 48, 1), np.float32), convention='unbiased')
    assert poses.shape == (1, 17, 4)
    np.testing.assert_allclose(poses[0, :, :2], true, atol=1e-3)

# ---- missing joints

@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 9999), st.sampled_from([0., .005, .3]))
@settings(max_examples=100, deadline=None)
def test_fast_search_is_the_plain_search(n, n_tags, seed, level):
    rng = np.random.default_rng(seed)
    heat = (level*rng.integers(-1, 3, n)).astype(np.float32)
    tags,means = (rng.integers(-4, 5, (m, n_tags)).astype(np.float32)/2 for m in (n, 7))
    want = [(heat - np.round(np.linalg.norm(tags - mean, axis=-1))).argmax() for mean in means]
    maps = np.zeros((2, 1, n), np.float32),np.zeros((2, 1, n, n_tags), np.float32)
    maps[0][1],maps[1][1] = heat,tags
    np.testing.assert_array_equal(_best_pixels(*maps, 1, means), want)
    np.testing.assert_array_equal(_best_pixels(*map(torch.tensor, maps), 1, means), want)

def test_search_in_pieces():
    "A map larger than a piece; equal scores in several pieces: the first"
    heat,tags = np.full(50_000, .5, np.float32),np.zeros((50_000, 2), np.float32)
    tags[:20_000] = 9
    assert _best_pixel(heat, tags, np.zeros((1, 2), np.float32))[0] == [20_000]
    heat[40_000] = .6
    assert _best_pixel(heat, tags, np.zeros((1, 2), np.float32))[0] == [40_000]

def test_refine_leaves_its_input():
    heat,tags,_,_ = draw(np.random.default_rng(0), 2, 17, missing=.4)
    poses = group(heat, tags, refine=False)[0]
    before = poses.copy()
    refine_poses(poses, heat, tags)
    np.testing.assert_array_equal(poses, before)

@given(st.integers(0, 9999), st.sampled_from([.05, 1, 3]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_refine_threshold_only_takes_away(seed, threshold, tensors):
    "Joints filled with a threshold are those filled without, less the ones whose tag is far"
    rng = np.random.default_rng(seed)
    heat,tags,_,_ = draw(rng, 3, 17, missing=.4)
    heat += rng.uniform(0, .05)                            # somewhere there is always a positive pixel
    poses = group(heat, tags, refine=False)[0]
    maps = tuple(map(torch.tensor, (heat, tags))) if tensors else (heat, tags)
    free,near = refine_poses(poses, *maps),refine_poses(poses, *maps, tag_threshold=threshold)
    means = poses[..., 3:].sum(1)/(poses[..., 2] > 0).sum(1)[:, None]
    x,y = (free[..., :2] - .5).round().astype(int).transpose(2, 0, 1)
    far = np.linalg.norm(tags[np.arange(17), y, x] - means[:, None], axis=-1) >= threshold
    far &= poses[..., 2] == 0
    np.testing.assert_array_equal(near, np.where(far[..., None], poses, free))

def stranger():
    "A whole person, and a nose whose tag nobody has"
    heat,tags,_,_ = draw(np.random.default_rng(0), 1, 17, missing=0, size=(64, 80))
    y,x = np.argwhere(heat[0] == 0)[0] + 2
    heat[0, y, x],tags[0, y-2:y+3, x-2:x+3] = .9,50
    return heat, tags

def joints_found(poses): return sorted((poses[..., 2] > 0).sum(1))

def test_refine_threshold_of_group():
    assert joints_found(group(*stranger())[0]) == [17, 17]
    assert joints_found(group(*stranger(), refine_threshold=1)[0]) == [1, 17]
    assert joints_found(group(*stranger(), convention='unbiased')[0]) == [1, 17]
    assert joints_found(group(*stranger(), convention='unbiased', refine_threshold=np.inf)[0]) == [17, 17]

# ---- matching

def test_equal_first_tags():
    "Two people whose first tags are the same float: merged by the original's keys, kept apart otherwise"
    val_k,loc_k = np.full((2, 2), .9, np.float32),np.arange(8).reshape(2, 2, 2)
    tag_k = np.tile(np.array([[1, 0], [1, 5]], np.float32), (2, 1, 1))
    kw = dict(order=[0, 1])
    apart,merged = (match_by_tag(val_k, loc_k, tag_k, solver=s, **kw) for s in ('scipy', 'munkres'))
    assert len(apart) == 2 and len(merged) == 1
    np.testing.assert_array_equal(apart[..., :2], loc_k.swapaxes(0, 1))

def test_max_people():
    rng = np.random.default_rng(0)
    val_k,loc_k = rng.uniform(.2, 1, (5, 6)).astype(np.float32),rng.integers(0, 50, (5, 6, 2))
    tag_k = np.arange(30, dtype=np.float32).reshape(5, 6, 1)*3
    order = range(5)
    assert len(match_by_tag(val_k, loc_k, tag_k, order, max_people=6)) == 30
    assert len(match_by_tag(val_k, loc_k, tag_k, order, max_people=6, ignore_too_much=True)) == 6

@pytest.mark.parametrize('solver', ['scipy', 'munkres'])
def test_order_decides_who_starts(solver):
    val_k,loc_k,tag_k = np.full((2, 1), .9, np.float32),np.zeros((2, 1, 2), int),np.array([[[0.]], [[9.]]], np.float32)
    assert [p[:, 2].argmax() for p in match_by_tag(val_k, loc_k, tag_k, [1, 0], solver=solver)] == [1, 0]

# ---- bad and empty maps

@pytest.mark.parametrize('T', [1, 2])
def test_nobody(T):
    for heat in (np.zeros((17, 20, 30)), np.full((17, 20, 30), -1.), np.full((17, 1, 1), .05)):
        for convention in ('original', 'unbiased'):
            poses,scores = group(heat, np.zeros((*heat.shape, T)), convention=convention)
            assert poses.shape == (0, 17, 3 + T) and scores.shape == (0,)

@given(st.sampled_from(['heat', 'tags']), st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 999), st.sampled_from(['scipy', 'munkres']), st.booleans())
@settings(max_examples=30, deadline=None)
def test_not_finite(which, bad, seed, solver, tensors):
    rng = np.random.default_rng(seed)
    maps = dict(zip(('heat', 'tags'), draw(rng, 2, 17)))
    maps[which].flat[rng.integers(maps[which].size)] = bad
    with pytest.raises(ValueError, match=f'{which}: 1 of .* NaN or infinite'):
        group(*(torch.tensor(m) if tensors else m for m in maps.values()), solver=solver)

def test_large_values_are_no_error():
    heat,tags,_,_ = draw(np.random.default_rng(0), 2, 17)
    assert len(group(heat*np.float32(1e36), tags)[0]) == len(group(heat, tags)[0])

@pytest.mark.parametrize('heat,tags,message', [
    ((1, 17, 20, 30), (17, 20, 30, 2), r'one image.*\(1, 17, 20, 30\)'), ((14, 20, 30), (14, 20, 30, 2), 'K = 17'), ((17, 0, 30), (17, 0, 30, 2), 'heat: maps'),
    ((17, 20, 30), (17, 20, 30), r'tags: shape \(17 or 1, 20, 30, T\)'), ((17, 20, 30), (17, 30, 20, 2), 'tags: shape'), ((17, 20, 30), (5, 20, 30, 2), 'tags: shape'),
    ((17, 20, 30), (17, 20, 30, 0), 'tags: shape')])
def test_wrong_shapes(heat, tags, message):
    with pytest.raises(ValueError, match=message): group(np.zeros(heat), np.zeros(tags))

@pytest.mark.parametrize('argument', [dict(solver='greedy'), dict(convention='udp'), dict(nms_kernel=4), dict(nms_kernel=0), dict(detection_threshold=-1), dict(max_people=0)])
def test_wrong_arguments(argument):
    heat,tags,_,_ = draw(np.random.default_rng(0), 2, 17)
    with pytest.raises(ValueError, match=next(iter(argument)).split('_')[0]): group(heat, tags, **argument)
    with pytest.raises(ValueError, match=next(iter(argument)).split('_')[0]): group(heat*0, tags, **argument)

def test_wrong_order():
    with pytest.raises(ValueError, match='order: each of the 2 joints'): match_by_tag(np.zeros((2, 1)), np.zeros((2, 1, 2)), np.zeros((2, 1, 1)))
