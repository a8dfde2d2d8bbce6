import re

from thinkrl.tools.figures import (
    accuracy_against_tokens,
    accuracy_at_budgets,
    constant,
    curve,
    histogram,
    importance_by_place,
    points_of_a_line,
    running_mean,
    thin,
)


def titles(svg: str) -> list[str]:
    return re.findall("<title>(.*?)</title>", svg, re.DOTALL)


def test_a_curve_by_hand():
    svg = curve("loss", [[(1, 4.0), (2, 0.0), (3, 2.0)]], [[(0, 2.0)]], (0, 3))
    # 320 x 132, margins 4 left, 42 right, 8 top, 18 bottom: steps 0..3 over 274, values 4..0 over 106.
    assert '<polyline class="raw run run-0" points="95.3,8.0 186.7,114.0 278.0,61.0"/>' in svg
    assert 'cx="4.0" cy="61.0" r="3.5"><title>held-out, step 0: 2</title>' in svg
    assert 'data-y0="0" data-y1="4"' in svg, "what the script needs to find the value under the pointer"
    flat = curve("tokens", [[(1, 12.0), (2, 12.0)]], [[]], (1, 2))
    assert 'points="4.0,61.0 278.0,61.0"' in flat, "a constant runs through the middle"


def test_runs_share_the_axes_of_a_curve():
    svg = curve("loss", [[(0, 4.0), (2, 4.0)], [(0, 0.0), (4, 0.0)]], [[], []], (0, 4))
    assert 'class="mean run run-0" points="4.0,8.0 141.0,8.0"' in svg
    assert 'class="mean run run-1" points="4.0,114.0 278.0,114.0"' in svg


def test_the_running_mean_is_centred():
    points = [(i, float(i)) for i in range(40)]
    assert running_mean(points)[10:12] == [(10, 10.0), (11, 11.0)] and running_mean(points)[0] == (0, 1.0)
    assert running_mean(points[:19]) == points[:19], "a short run is not smoothed"


def test_a_long_curve_keeps_its_peaks():
    points = [(i, 0.0) for i in range(10_000)]
    points[1234], points[7777] = (1234, 9.0), (7777, -3.0)
    thinned = thin(points, 400)
    assert len(thinned) <= 400 and {(1234, 9.0), (7777, -3.0)} <= set(thinned)
    assert thinned == sorted(thinned) and thin(points[:50], 50) == points[:50]


def test_many_runs_share_the_points():
    assert [points_of_a_line(runs) for runs in (1, 5, 10, 50)] == [400, 400, 200, 40]


def test_what_never_changes_is_constant():
    assert constant([[(1, 0.5), (2, 0.5)], [(1, 0.25)], []]) and not constant([[(1, 0.5), (2, 0.25)]])


def test_a_path_per_run_from_an_open_circle_to_a_full_one():
    path = [("before", 60.0, 0.5), ("step_5", 50.0, 0.6), ("after", 40.0, 0.7)]
    svg = accuracy_against_tokens([("run run-0", "grpo", path)])
    kinds = re.findall('<circle class="(\\w+) run run-0"', svg)
    assert kinds == ["start", "between", "end"] and titles(svg)[2] == "grpo, after: 70.0 % with 40.0 tokens"
    # the path runs to the upper left
    places = re.findall('<circle[^>]* cx="([\\d.]+)" cy="([\\d.]+)"', svg)
    xs, ys = zip(*[(float(x), float(y)) for x, y in places])
    assert xs[0] > xs[1] > xs[2] and ys[0] > ys[1] > ys[2]


def test_accuracy_at_budgets_on_a_logarithmic_axis():
    svg = accuracy_at_budgets([("run run-0", "after", [(16, 0.0), (32, 0.5), (64, 1.0)])])
    # 460 x 300, margins 46, 14, 26, 40: doublings are equally far apart
    assert 'points="46.0,260.0 246.0,143.0 446.0,26.0"' in svg
    assert titles(svg)[1] == "after, 32 tokens: 50.0 %"


def test_a_histogram_by_hand():
    svg = histogram([("run run-0", "before", [1, 1, 2, 35]), ("run run-1", "after", [35, 35])], "tokens")
    told = [title for title in titles(svg) if not title.endswith("before: 0.0 %\nafter: 0.0 %")]
    assert told == ["1 to 2\nbefore: 50.0 %\nafter: 0.0 %", "2 to 3\nbefore: 25.0 %\nafter: 0.0 %",
                    "35 to 36\nbefore: 25.0 %\nafter: 100.0 %"]  # fmt: skip
    assert len(titles(histogram([("a", "a", [0.0, 1.0])], "reward"))) <= 38


def test_importance_is_averaged_over_the_chains_that_are_long_enough():
    chains = [
        {"importance": [0.2, 0.4], "accuracies": [0.5, 1.0]},
        {"importance": [0.4], "accuracies": [0.0]},
    ]
    svg = importance_by_place(chains)
    assert titles(svg) == ["thought 1: importance 0.3", "thought 2: importance 0.4", "thought 1: accuracy 0.25",
                           "thought 2: accuracy 1"]  # fmt: skip


def test_names_of_runs_are_data():
    svg = accuracy_against_tokens([("run run-0", '</svg><script>"', [("before", 1.0, 0.5)])])
    assert "<script" not in svg and "&lt;script&gt;&#34;" in svg
