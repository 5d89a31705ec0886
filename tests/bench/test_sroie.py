"""How receipts are judged; that needs none of them."""

from __future__ import annotations

import pytest

from bench import sroie


def test_a_field_is_right_but_for_case_and_white_space_and_a_total_by_its_number() -> None:
    assert sroie.same("company", "Book TA .K(Taman Daya)", "BOOK TA .K (TAMAN DAYA)")
    assert not sroie.same("date", "25/12/2018", "25/12/2019")
    assert not sroie.same("company", None, "")
    assert sroie.same("total", "1234.50", "RM 1,234.50")
    assert not sroie.same("total", "", "9.00")


def test_the_first_json_object_of_free_text_is_taken() -> None:
    assert sroie.parsed('Here {it} is:\n```json\n{"total": "9.00", "more": {}}\n```\n{"total": "8"}') == {
        "total": "9.00",
        "more": {},
    }
    assert sroie.parsed("There is none { at all.") == {}


def test_separation_is_the_area_under_the_roc_curve() -> None:
    assert sroie.separation([0.9, 0.1, 0.8, 0.8], [True, False, True, False]) == pytest.approx(3.5 / 4)
