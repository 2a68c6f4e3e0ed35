"""Frame mAP at IoU 0.5, as AVA is scored."""

import math

import numpy as np

from ava.files import Rows


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, 4), (n, 4) x1 y1 x2 y2 -> (n,) intersection over union, without a +1 pixel."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    inter = np.maximum(sides, 0).prod(1)
    area_a, area_b = ((box[:, 2:] - box[:, :2]).prod(1) for box in (a, b))
    return inter / (area_a + area_b - inter)


def true_positives(group, box, score, true_group, true_box) -> np.ndarray:
    """(n,) bool: which detections are right.

    A group (int from 0) is a frame and a class; equal scores stay in order. Each detection looks
    only at the true box of its group that it overlaps most, the first among equals, and is right
    if the IoU is at least .5 and no higher-scored one took that box.
    """
    true_box = true_box[np.argsort(true_group, kind="stable")]
    groups = max(group.max(initial=0), true_group.max(initial=0)) + 1
    size = np.bincount(true_group, minlength=groups)  # true boxes of each group
    right = np.zeros(len(group), bool)
    has = np.flatnonzero(size[group])  # detections whose group has a true box
    if not len(has):
        return right
    low, count = (np.cumsum(size) - size)[group[has]], size[group[has]]
    # a detection's pairs with the true boxes of its group stand in a row
    start = np.cumsum(count) - count
    candidate = np.repeat(low - start, count) + np.arange(count.sum())
    iou = pairwise_iou(np.repeat(box[has], count, 0), true_box[candidate])
    best = np.maximum.reduceat(iou, start)
    is_best = iou == np.repeat(best, count)
    taken = np.minimum.reduceat(np.where(is_best, candidate, len(true_box)), start)
    has, taken = has[best >= 0.5], taken[best >= 0.5]
    order = np.argsort(-score[has], kind="stable")
    first = np.unique(taken[order], return_index=True)[1]  # the highest-scored of each true box
    right[has[order[first]]] = True
    return right


def average_precision(right: np.ndarray, total: int) -> float:
    """(n,) bool by descending score, number of true boxes -> area under the precision envelope.

    NaN if there are no true boxes.
    """
    if not total:
        return math.nan
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((envelope * right).sum() / total)  # recall rises by 1/total at each right one


def mean_of(aps: dict) -> float:
    """The mean over the classes that have true boxes."""
    return float(np.mean([ap for ap in aps.values() if not math.isnan(ap)] or [math.nan]))


def counted(rows: Rows, classes, places: dict, dropped: set, most: int | None = None):
    """The rows that count -> frame, column of the class in `classes`, box, score.

    places: {key: number of the frame}, to which new keys are added; dropped: keys that do not
    count; most: only so many rows of a frame, the highest-scored.
    """
    place = [-1 if key in dropped else places.setdefault(key, len(places)) for key in rows.keys]
    frame = np.array(place, int)[rows.frame]
    column = np.minimum(np.searchsorted(classes, rows.id), len(classes) - 1)
    keep = (frame >= 0) & (classes[column] == rows.id)
    if most:
        kept = np.flatnonzero(keep)
        order = kept[np.lexsort((-rows.score[kept], frame[kept]))]  # stable: by frame, by score
        first = np.searchsorted(frame[order], frame[order])
        keep[order[np.arange(len(order)) - first >= most]] = False
    return frame[keep], column[keep], rows.box[keep], rows.score[keep]


def frame_map(truth: Rows, found: Rows, class_ids, excluded=(), protocol: str = "paper") -> dict:
    """Frame mAP at IoU .5, as AVA's evaluation has it.

    -> {"map": mean AP over the classes with true boxes, "ap": {class id: AP in [0,1] or NaN},
    "count": {class id: true boxes}, "flat": {class id: AP}, "flat_map": their mean}: flat is what
    the same boxes get with one score for all, ties taken as one step.

    Classes and frames that do not count are dropped, and detections without area (a true box
    without area counts as missed). Then comes `true_positives`, then per class over all frames
    `average_precision`. Detections on frames without true boxes are wrong. protocol "activitynet"
    instead ignores frames that the truth does not list, and takes the 50 highest-scored rows of a
    frame only.
    """
    if protocol not in ("paper", "activitynet"):
        raise ValueError(f"protocol={protocol!r}: expected paper or activitynet")
    classes = np.array(sorted(class_ids))
    K = len(classes)
    places = {key: i for i, key in enumerate(truth.keys)}
    dropped, most = set(excluded), None
    if protocol == "activitynet":
        dropped |= set(found.keys) - set(truth.keys)
        most = 50
    true_frame, true_column, true_box, _ = counted(truth, classes, places, dropped)
    rows = counted(found, classes, places, dropped, most)
    full = (rows[2][:, 2:] > rows[2][:, :2]).all(1)
    frame, column, box, score = (x[full] for x in rows)
    right = true_positives(frame * K + column, box, score, true_frame * K + true_column, true_box)
    order = np.lexsort((-score, column))  # by class, then by score; stable
    ends = np.searchsorted(column[order], np.arange(K + 1))
    count = np.bincount(true_column, minlength=K).tolist()
    ap, flat = {}, {}
    for k, c in enumerate(classes.tolist()):
        mine = right[order[ends[k]:ends[k + 1]]]
        ap[c] = average_precision(mine, count[k])
        one_step = count[k] and len(mine)
        flat[c] = float(mine.mean() * mine.sum() / count[k]) if one_step else ap[c]
    return dict(map=mean_of(ap), ap=ap, count=dict(zip(classes.tolist(), count)),
                flat=flat, flat_map=mean_of(flat))


def report(truth: Rows, found: Rows, names: dict, excluded: set, protocol: str, say) -> dict:
    """Prints mAP and a per-class table, beside what one score for all would get; -> frame_map."""
    if len(found.keys) and not set(found.keys) & set(truth.keys):
        raise ValueError(f"none of the {len(found.keys)} frames with detections is annotated; the "
                         f"first ones are {found.keys[0]} there and {truth.keys[0]} in the "
                         "annotation: other names or other seconds?")
    result = frame_map(truth, found, list(names), excluded, protocol)
    ap, flat, count = result["ap"], result["flat"], result["count"]
    say(f"{'class':36s} boxes     AP  constant score")
    for c in sorted(names, key=lambda c: (math.isnan(ap[c]), -np.nan_to_num(ap[c]))):
        if count[c]:
            say(f"{names[c][:36]:36s} {count[c]:5d} {100 * ap[c]:6.2f} {100 * flat[c]:7.2f}")
    absent = sum(n == 0 for n in count.values())
    say(f"frame mAP at IoU 0.5: {100 * result['map']:.2f} "
        f"(constant score: {100 * result['flat_map']:.2f}), mean of {len(names) - absent} classes"
        + (f"; {absent} have no true box" if absent else "")
        + (", ActivityNet's protocol" if protocol == "activitynet" else ""))
    return result
