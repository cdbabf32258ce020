"Evaluation: the printed numbers of the original, and the fast evaluator against pycocotools"
import json, time
import numpy as np, pytest
from hypothesis import example, given, settings, strategies as st
from types import SimpleNamespace
from posenb.skeleton import Skeleton, COCO, CROWDPOSE
from posenb.evaluate import (ap_by_joint, ap_by_size, ap_table, coco_ap, crowdpose_ap, error_costs, error_shares, found_arrays, joint_errors,
                             pose_ap, save_results, to_results, truth_arrays)

names = {'AP': 'AP', 'Ap .5': 'AP50', 'AP .75': 'AP75', 'AP (M)': 'APm', 'AP (L)': 'APl',
         'AR': 'AR', 'AR .5': 'AR50', 'AR .75': 'AR75', 'AR (M)': 'ARm', 'AR (L)': 'ARl'}

def skeleton(k, seed=0):
    rng = np.random.default_rng(seed)
    return Skeleton([f'joint{i}' for i in range(k)], [(i, i+1) for i in range(0, k-1, 3)], [], rng.uniform(.02, .15, k))

def random_case(seed, k, n_images, tidy=False):
    "Annotations with crowds, people without joints, people labelled twice, ids from 0; results with equal scores, close twins, far too many people, and some where nobody is"
    rng,annotations,results = np.random.default_rng(seed),[],[]
    for image in range(n_images):
        for _ in range(rng.choice([0, 0, 1, 30])):
            joints = np.concatenate([rng.uniform(0, 300, (k, 2)), np.ones((k, 1))], 1)
            if rng.random() < .3: results.append(dict(image_id=image*7, category_id=1, keypoints=joints.ravel().tolist(), score=round(rng.random(), 1)))
        for _ in range(rng.integers(0, 6)):
            side = rng.uniform(10, 200)
            box = [*rng.uniform(0, 300, 2), side*rng.uniform(.5, 2), side]
            joints = np.concatenate([box[:2] + rng.random((k, 2))*box[2:], rng.integers(0, 3, (k, 1))], 1)
            if rng.random() < .15 and not tidy: joints[:] = 0
            crowd = int(rng.random() < .15 and not tidy)
            annotations.append(dict(id=len(annotations), image_id=image*7, category_id=1, bbox=box, area=box[2]*box[3]*rng.uniform(.3, 1), iscrowd=crowd,
                                    keypoints=joints.ravel().tolist(), num_keypoints=0 if crowd else int((joints[:, 2] > 0).sum())))
            if rng.random() < .1 and not tidy: annotations.append(dict(annotations[-1], id=len(annotations)))
            for _ in range(rng.integers(0, 4) if rng.random() < .9 else 25):
                near = joints + np.append(rng.normal(0, side*rng.choice([0, .02, .1, .5]), 2), 0)
                if not joints.any(): near[:, :2] += box[:2]
                results.append(dict(image_id=image*7, category_id=1, keypoints=near.ravel().tolist(), score=round(rng.random(), 1)))
    images = [dict(id=i*7) for i in rng.permutation(n_images).tolist()]
    results = [results[i] for i in rng.permutation(len(results))]
    return dict(images=images, annotations=annotations, categories=[dict(id=1, name='person', keypoints=[str(i) for i in range(k)])]), results

def people(p, s): return SimpleNamespace(keypoints=np.array(p, np.float32), scores=np.array(s, np.float32))

def test_crowdpose_golden(golden):
    gold = json.loads(golden('crowdpose_eval.json').read_text())
    results = [r for p,s,i in zip(gold['preds'], gold['scores'], gold['ids']) for r in to_results(people(p, s), i)]
    names = {'AP': 'AP', 'Ap .5': 'AP50', 'AP .75': 'AP75', 'AR': 'AR', 'AR .5': 'AR50', 'AR .75': 'AR75',
             'AP (easy)': 'AP easy', 'AP (medium)': 'AP medium', 'AP (hard)': 'AP hard'}
    ours = crowdpose_ap(golden('crowdpose_eval_gt.json'), results)
    assert len(ours) == len(names)
    for theirs,name in names.items(): assert ours[name] == pytest.approx(gold['stats'][theirs], abs=1e-6), name

@pytest.mark.parametrize('case', ['A_default', 'B_noflip', 'E_norefine_noadjust'])
@pytest.mark.parametrize('fast', [False, True])
def test_coco_golden(golden, coco_tiny, case, fast):
    stats = json.loads(golden('inference_cv5.json').read_text())[case]
    ours = coco_ap(coco_tiny/'annotations/person_keypoints_val2017.json', golden(f'inference_cv5_{case}_results.json'),
                   image_ids=[i['image_id'] for i in stats['images']], fast=fast)
    for theirs,name in names.items(): assert ours[name] == pytest.approx(stats['coco_stats'][theirs], abs=1e-6), name

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 30), n_images=st.integers(1, 12), subset=st.booleans(),
       boxes=st.booleans(), whole_pixels=st.booleans(), lost=st.sampled_from(['none', 'none', 'truth', 'results', 'people of odd images']))
@example(seed=3322708, k=1, n_images=2, subset=True, boxes=True, whole_pixels=False, lost='none')       # no result in the subset
def test_fast_is_pycocotools(seed, k, n_images, subset, boxes, whole_pixels, lost):
    annotations,results = random_case(seed, k, n_images)
    if boxes: results = [dict(r, bbox=[0, 0, r['score']*200, 99]) for r in results]
    if whole_pixels: results = [dict(r, keypoints=np.round(r['keypoints']).tolist()) for r in results]
    if lost == 'truth': annotations['annotations'] = []
    if lost == 'results': results = []
    if lost == 'people of odd images': annotations['annotations'] = [a for a in annotations['annotations'] if a['image_id'] % 2 == 0]
    kw = dict(skeleton=skeleton(k), image_ids=[i*7 for i in range(0, n_images, 2)] if subset else None)
    reference,ours = coco_ap(annotations, results, fast=False, **kw),coco_ap(annotations, results, **kw)
    assert reference == pytest.approx(ours, abs=1e-9)

@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_crowdpose_is_pycocotools(seed):
    "CrowdPose is COCO with other areas: .53 of the box"
    annotations,results = random_case(seed, 14, 8)
    annotations['annotations'] = [dict(a, area=.53*a['bbox'][2]*a['bbox'][3]) for a in annotations['annotations']]
    for i,image in enumerate(annotations['images']): image['crowdIndex'] = (.1, .2, .5, .8)[i % 4]
    levels = dict(zip(('easy', 'medium', 'hard'), (annotations['images'][::4], annotations['images'][1::4] + annotations['images'][2::4], annotations['images'][3::4])))
    reference = coco_ap(annotations, results, CROWDPOSE, fast=False)
    expected = {k: reference[k] for k in ('AP', 'AP50', 'AP75', 'AR', 'AR50', 'AR75')}
    for name,images in levels.items():
        expected[f'AP {name}'] = round(coco_ap(annotations, results, CROWDPOSE, [i['id'] for i in images], fast=False)['AP'], 4)
    assert crowdpose_ap(annotations, results) == pytest.approx(expected, abs=1e-9)

def test_known_cases():
    "One person: equal scores keep the order of the file, the 21st detection does not count, an empty image counts against"
    joints = [1., 1., 2.]*17
    annotations = dict(images=[dict(id=1), dict(id=2)], categories=[dict(id=1, name='person', keypoints=COCO.names)],
                       annotations=[dict(id=1, image_id=1, category_id=1, keypoints=joints, num_keypoints=17, iscrowd=0, area=4000., bbox=[0, 0, 1, 1])])
    right,wrong = (dict(image_id=1, category_id=1, keypoints=[x, x, 1.]*17, score=.5, bbox=[0, 0, 60, 60]) for x in (1., 900.))
    empty = dict(wrong, image_id=2)
    for results,ap,ar in (([right], 1, 1), ([wrong], 0, 0), ([right, wrong], 1, 1), ([wrong, right], .5, 1), ([wrong]*19 + [right], .05, 1),
                          ([wrong]*20 + [right], 0, 0), ([right]*25, 1, 1), ([dict(empty, score=.6), right], .5, 1), ([empty, right], 1, 1)):
        for fast in (False, True):
            ours = coco_ap(annotations, results, fast=fast)
            assert (ours['AP'], ours['AR']) == pytest.approx((ap, ar), abs=1e-9), (len(results), fast)
            assert ours['APm'] == ours['AP'] and ours['APl'] == -1

@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 20))
def test_breakdowns_hold_together(seed, k):
    annotations,results = random_case(seed, k, 6)
    sk = skeleton(k)
    if not any(a['num_keypoints'] and not a['iscrowd'] for a in annotations['annotations']): return
    costs = error_costs(annotations, results, sk)
    assert sum(costs.values()) == pytest.approx(1) and costs['AP'] == pytest.approx(coco_ap(annotations, results, sk)['AP'])
    whole = ap_by_size(annotations, results, sk, sides=(0,))['over 0']
    assert whole['AP'] == pytest.approx(costs['AP'])
    if k == 1: assert ap_by_joint(annotations, results, sk)['joint0']['AP'] == pytest.approx(costs['AP'])
    shares = error_shares(annotations, results, sk)['all']
    assert sum(v for n,v in shares.items() if n != 'joints') == pytest.approx(1 if shares['joints'] else 0)

def test_kinds_of_error():
    "Each kind on one joint of a clean person, with another person beside"
    rng = np.random.default_rng(0)
    a,b = (np.c_[rng.uniform(0, 300, (17, 2)) + [x, 0], np.full(17, 2)] for x in (0, 2000))
    records = [dict(id=i, image_id=1, category_id=1, keypoints=j.ravel().tolist(), num_keypoints=17, iscrowd=0, area=1e4, bbox=[0, 0, 1, 1])
               for i,j in enumerate((a, b))]
    annotations = dict(images=[dict(id=1)], annotations=records, categories=[dict(id=1, keypoints=COCO.names)])
    pose = a.copy()
    pose[5, :2] += [100*2*COCO.sigmas[5], 0]       # similarity exp(-1/2)
    pose[9] = a[10]                                # the other wrist
    pose[13] = b[13]                               # the other person's knee
    pose[15] = b[16]                               # the other person's other ankle
    pose[0, :2] = -5000
    truth = truth_arrays(annotations)
    kind,who = joint_errors(truth, found_arrays([dict(image_id=1, category_id=1, score=1., keypoints=pose.ravel().tolist())], truth))
    expected = np.zeros(17, int)
    expected[[5, 9, 13, 15, 0]] = [1, 2, 3, 3, 4]
    assert who.tolist() == [0] and kind[0].tolist() == expected.tolist()

def test_nothing_found_is_zero():
    annotations,_ = random_case(1, 17, 5, tidy=True)
    for fast in (False, True):
        ours = coco_ap(annotations, [], fast=fast)
        assert ours['AP'] == ours['AR'] == 0
        assert coco_ap({**annotations, 'annotations': []}, [], fast=fast)['AP'] == -1
    crowd = {**annotations, 'categories': [dict(id=1, keypoints=CROWDPOSE.names)], 'annotations': [], 'images': [dict(id=0, crowdIndex=.1)]}
    assert crowdpose_ap(crowd, [])['AP easy'] == -1

def test_bad_input(tmp_path):
    annotations,results = random_case(2, 17, 5)
    one = [dict(image_id=0, category_id=1, keypoints=[1.]*51, score=.5)]
    for bad,message in (([{**one[0], 'image_id': 5}], 'not in the annotations'), ([{**one[0], 'keypoints': [1.]*50}], '50 numbers'),
                        ([{**one[0], 'score': float('nan')}], 'score of record 0'), ([{**one[0], 'keypoints': [float('inf')]*51}], 'not finite'),
                        ([{**one[0], 'category_id': 2}], 'category_id 2'), ({}, 'a list of'), ([{'image_id': 0}], "no 'category_id'")):
        for fast in (False, True):
            with pytest.raises(ValueError, match=message): coco_ap(annotations, bad, fast=fast)
    with pytest.raises(FileNotFoundError, match='annotations: there is no file'): coco_ap(tmp_path/'none.json', one)
    (tmp_path/'half.json').write_text('{"images": [')
    with pytest.raises(ValueError, match='half.json is not a JSON file'): coco_ap(tmp_path/'half.json', one)
    with pytest.raises(ValueError, match='one category with 14 keypoints'): coco_ap(annotations, one, CROWDPOSE)
    with pytest.raises(ValueError, match="no 'crowdIndex' in record 0"):
        crowdpose_ap({**annotations, 'annotations': [], 'categories': [dict(id=1, keypoints=CROWDPOSE.names)]}, [])
    for bad in ([], {**annotations, 'images': None}):
        with pytest.raises(ValueError, match='a COCO dictionary'): pose_ap(bad, one)
    for field,value,message in (('bbox', None, "1 people have no 'bbox' .*, for instance annotation 1"), ('bbox', [1, 2], "no 'bbox'"), ('image_id', ..., "no 'image_id' in record 1")):
        people = [dict(a) for a in annotations['annotations']]
        if value is ...: del people[1][field]
        else: people[1][field] = value
        with pytest.raises(ValueError, match=f'annotations: .*{message}'): pose_ap({**annotations, 'annotations': people}, one)

def without_areas(annotations, which=lambda a: True):
    return {**annotations, 'annotations': [{k: v for k,v in a.items() if k != 'area' or not which(a)} for a in annotations['annotations']]}

def test_people_without_area():
    "They have .53 of their box, by every function; some people with and some without area are an error"
    annotations,results = random_case(5, 17, 6, tidy=True)
    bare = without_areas(annotations)
    boxed = {**annotations, 'annotations': [dict(a, area=.53*a['bbox'][2]*a['bbox'][3]) for a in annotations['annotations']]}
    for f in (pose_ap, coco_ap, ap_by_size, ap_by_joint, error_costs, error_shares): assert f(bare, results) == f(boxed, results), f
    assert coco_ap(bare, results, fast=False) == pytest.approx(coco_ap(boxed, results), abs=1e-9)
    some = without_areas(annotations, lambda a: a['id'] == 3)
    with pytest.raises(ValueError, match=f"1 of {len(some['annotations'])} people have no 'area', for instance annotation 3"): pose_ap(some, results)

def test_pose_ap_follows_the_dataset(golden):
    gold,truth = json.loads(golden('crowdpose_eval.json').read_text()),golden('crowdpose_eval_gt.json')
    results = [r for p,s,i in zip(gold['preds'], gold['scores'], gold['ids']) for r in to_results(people(p, s), i)]
    assert pose_ap(truth, results, CROWDPOSE) == crowdpose_ap(truth, results)
    crowd = json.loads(truth.read_text())
    assert pose_ap(without_areas(crowd), results, CROWDPOSE)['AP'] == crowdpose_ap(crowd, results)['AP']
    ids = [i['id'] for i in crowd['images'][::2]]
    half = {**crowd, 'images': crowd['images'][::2], 'annotations': [a for a in crowd['annotations'] if a['image_id'] in ids]}
    assert pose_ap(truth, results, CROWDPOSE, ids) == crowdpose_ap(half, [r for r in results if r['image_id'] in ids])
    annotations,results = random_case(6, 17, 5)
    assert pose_ap(annotations, results) == coco_ap(annotations, results)

def test_two_categories_with_as_many_joints():
    "One is chosen by name or id"
    annotations,results = random_case(7, 4, 5, tidy=True)
    sk,alone = skeleton(4),coco_ap(annotations, results, skeleton(4))
    two = {**annotations, 'categories': [*annotations['categories'], dict(id=2, name='mouse', keypoints=list('abcd'))],
           'annotations': [*annotations['annotations'], *[dict(a, category_id=2, id=a['id']+1000) for a in annotations['annotations'][:1]]]}
    with pytest.raises(ValueError, match='4 .person., 4 .mouse.; where several fit, choose with category='): pose_ap(two, results, sk)
    for category in (1, 'person'): assert pose_ap(two, results, sk, category=category) == alone
    mouse = [dict(r, category_id=2) for r in results]
    assert pose_ap(two, mouse, sk, category='mouse') == pose_ap(two, mouse, sk, category=2) != alone
    assert error_costs(two, results, sk, category=1)['AP'] == ap_by_size(two, results, sk, category=1, sides=(0,))['over 0']['AP'] == alone['AP']
    with pytest.raises(ValueError, match="one category called 'rat' with 4 keypoints"): pose_ap(two, results, sk, category='rat')

def test_input_is_not_changed():
    annotations,results = random_case(3, 17, 4)
    before = json.dumps([annotations, results])
    for fast in (False, True): coco_ap(annotations, results, fast=fast)
    error_costs(annotations, results)
    assert json.dumps([annotations, results]) == before

def test_results_file(tmp_path):
    records = to_results(people([[[1, 2, .5], [4, 6, .7]]], [.6]), 3)
    assert records[0]['bbox'] == [1, 2, 3, 4] and all(type(x) is float for x in records[0]['keypoints'])
    path = save_results(records, tmp_path/'results.json')
    with pytest.raises(TypeError): save_results([object()], path)
    assert json.loads(path.read_text()) == records and [p.name for p in tmp_path.iterdir()] == ['results.json']

def test_table():
    lines = ap_table({'a': dict(AP=.5, APl=-1., n=3), 'longer': dict(AP=1., APl=.25, n=12)}).splitlines()
    assert len({len(l) for l in lines}) == 1
    assert [c.strip() for c in lines[2].split('|')[1:-1]] == ['a', '0.500', '-', '3']

def test_fast_enough():
    "Many times faster than pycocotools on 3,000 detections"
    annotations,results = random_case(4, 17, 600)
    results = results[:3000]
    start = time.perf_counter(); slow = coco_ap(annotations, results, fast=False); middle = time.perf_counter()
    ours = coco_ap(annotations, results); end = time.perf_counter()
    assert slow == pytest.approx(ours, abs=1e-9)
    assert (middle-start)/(end-middle) > 5
