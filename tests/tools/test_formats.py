from thinkrl.tools.formats import change, duration, number, tick, ticks, visible


def test_numbers():
    assert (
        number(0.6345) == "0.634"
        and number(12345.6) == "12,346"
        and number(None) == number(float("nan")) == "–"
    )
    assert number(0.5, "accuracy") == "50.0 %" and number(36.952, "tokens") == "37.0"
    assert number(-0.25) == "−0.25" and number(0.25, sign=True) == "+0.25"
    assert tick(0.5, "accuracy") == "50 %" and tick(40.0, "tokens") == "40"


def test_a_change_has_a_verdict():
    assert change(0.5, 0.75, "accuracy") == ("good", "+25.0") and change(0.5, 0.25, "accuracy") == (
        "bad",
        "−25.0",
    )
    assert change(40, 30, "tokens") == ("good", "−25.0 %") and change(40, 60, "tokens") == ("bad", "+50.0 %")
    assert change(0.5, 0.5, "accuracy")[0] == "same" and change(None, 1.0, "tokens") == ("", "")
    assert change(0.0, 1.0, "tokens") == ("", ""), "nothing is relative to nothing"


def test_what_could_turn_the_page_s_text_round_is_shown():
    assert (
        visible("1\u202e23\u2066") == "1⟨U+202E⟩23⟨U+2066⟩" and visible("\x00a\x1b\x7f\x85") == "␀a␛␡⟨U+0085⟩"
    )
    assert visible("a\n\tשלום") == "a\n\tשלום", "letters that run from right to left are letters"


def test_ticks_are_few_and_round():
    assert ticks(0.0, 1.0) == [0.0, 0.5, 1.0]
    assert ticks(30.0, 60.0) == [30.0, 40.0, 50.0, 60.0]
    for low, high in ((0.123, 0.124), (-5e-7, 3e-6), (17.0, 9000.0), (99.99, 100.01)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 4 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9


def test_durations():
    assert [duration(s) for s in (9.6, 62, 3720)] == ["10 s", "1 min 2 s", "1 h 2 min"]
