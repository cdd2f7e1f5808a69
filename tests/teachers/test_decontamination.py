"""N-grams shared with a test set, in any language."""

from __future__ import annotations

import pytest

from cotgrpo.teachers.decontamination import TestQuestions, counted_runs, join_words, words


def test_decontamination() -> None:
    test = TestQuestions(["The quick, brown fox jumps!", "Hi there"], n=4)
    assert test.overlap("Say THE quick brown fox.") == "the quick brown fox"
    assert test.overlap("quick brown fox leaps") is None and test.overlap("Hi there, you") is None
    assert test.overlap("hi THERE!") == "hi there" and test.overlap("") is None
    with pytest.raises(ValueError, match="at least 1"):
        TestQuestions([], 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tom's 3.5 kg, x_1 = 1,234,567.89.", ["tom", "s", "3.5", "kg", "x", "1", "1234567.89"]),
        ("1,2,3 and 12,34", ["1", "2", "3", "and", "12", "34"]),
        ("答案是１２元。", ["答", "案", "是", "12", "元"]),
        ("共１，２３４元", ["共", "1234", "元"]),
        ("Ｔｏｍ買了3個", ["tom", "買", "了", "3", "個"]),
        ("りんごが３個", ["り", "ん", "ご", "が", "3", "個"]),
        ("ｶﾞﾗｽ ガラス", ["ガ", "ラ", "ス", "ガ", "ラ", "ス"]),
        ("사과가 3개 있다", ["사과가", "3개", "있다"]),
        ("हिन्दी में ३ किताबें", ["हिन्दी", "में", "3", "किताबें"]),
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("كَتَبَ ٣٥ كِتَابًا؟", ["كَتَبَ", "35", "كِتَابًا"]),
        ("می‌خواهم", ["میخواهم"]),
        ("Ёлка, ЁЛКА", ["ёлка", "ёлка"]),
        ("Straße naïve nai\u0308ve", ["strasse", "naïve", "naïve"]),
        ("น้ำ ๕๐ บาท", ["น้ํ", "า", "50", "บ", "า", "ท"]),
        ("ສະບາຍດີ", ["ສ", "ະ", "ບ", "າ", "ຍ", "ດີ"]),
        ("ខ្ញុំ", ["ខ្", "ញុំ"]),
        ("ကျွန်တော်", ["ကျွ", "န်", "တော်"]),
        ("soft\u00adhyphen zero\u200bwidth", ["softhyphen", "zerowidth"]),
        ("、。！？…—", []),
    ],
)
def test_words_of_any_language(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_letters_count_half_a_word_and_ideographs_a_whole_one() -> None:
    assert [join_words(run) for run in counted_runs(words("一二三四"), 3)] == ["一二三", "二三四"]
    assert [join_words(run) for run in counted_runs(words("かきくけこ"), 2)] == ["かきくけ", "きくけこ"]
    assert [join_words(run) for run in counted_runs(words("三かき個 two"), 3)] == ["三かき個", "かき個two"]
    assert list(counted_runs(words("かき"), 2)) == []


@pytest.mark.parametrize(
    ("text", "is_known"),
    [
        ("What is 12 - 5?", True),
        ("what is １２－５", True),
        ("What is 12\u22125?", True),
        ("What is 12 + 5?", False),
        ("What is -12 - 5?", False),
        ("What is 12 5?", False),
        ("3×(4+5)=?", True),
        ("3 * (4 + 5) =", True),
        ("3×(4-5)=?", False),
        ("3÷(4+5)=?", False),
        ("Is 7 < 9?", True),
        ("Is 7 > 9?", False),
        ("A well known - and short - one", True),
    ],
)
def test_short_questions_with_other_operators_are_others(text: str, is_known: bool) -> None:
    test = TestQuestions(["What is 12-5?", "3×(4+5)=?", "Is 7 < 9?", "A well-known and short one"], n=13)
    assert (test.overlap(text) is not None) == is_known


QUESTIONS = {
    "Chinese": "一个果园里有苹果树35棵，梨树比苹果树的2倍少8棵，这个果园一共有多少棵果树？",
    "traditional Chinese": "小華有12枝鉛筆，比小明的3倍少6枝，請問兩個人一共有多少枝鉛筆？",
    "Japanese": "太郎さんはりんごを12個、みかんを15個持っています。花子さんに7個あげると、全部で何個残りますか。",
    "Korean": "한 상자에 사과가 12개씩 있습니다. 상자 5개를 사서 친구 4명과 똑같이 나누면 한 명이 몇 개를 받습니까?",
    "Thai": "ชาวสวนเก็บมะม่วงได้ 125 ผล ขายไป 48 ผล แล้วนำที่เหลือใส่ถุง ถุงละ 7 ผล จะได้ทั้งหมดกี่ถุง",
    "Hindi": "एक दुकान में 45 किताबें हैं और हर किताब की कीमत 120 रुपये है, तो सभी किताबों की कुल कीमत कितनी होगी?",
    "Russian": "В магазине было 45 килограммов яблок, за день продали 18 килограммов, сколько яблок осталось?",
    "Arabic": "اشترى أحمد ١٢ كتابًا بسعر ٣٥ ريالًا للكتاب الواحد، فكم ريالًا دفع أحمد ثمنًا لجميع هذه الكتب في النهاية؟",
    "English": "A farmer has 12 cows and 15 sheep, and he sells 7 of them; how many animals are left?",
    "mixed": "已知函数 f(x) = x^2 + 3x - 10，求方程 f(x) = 0 的两个根之和 (sum of the roots)。",
}
IN_FRONT = {
    "Chinese": "应用题：",
    "Japanese": "問題。",
    "Korean": "다음 문제를 푸세요. ",
    "Thai": "โจทย์ ",
    "English": "Solve: ",
}


@pytest.mark.parametrize("language", QUESTIONS)
def test_a_question_with_words_around_it_is_found(language: str) -> None:
    """With spaces, punctuation, widths and digits of another kind too. Those of other languages are not found."""
    test = TestQuestions([QUESTIONS[language]], 13)
    wide = {code: code + 0xFEE0 for code in range(ord("0"), ord("9") + 1)}
    for text in (QUESTIONS[language], QUESTIONS[language].translate(wide), QUESTIONS[language].replace("，", " , ")):
        assert test.overlap(f"{IN_FRONT.get(language, 'Q: ')}{text} (1)") is not None
    others = [test.overlap(text) for name, text in QUESTIONS.items() if name != language]
    assert others == [None] * len(others)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("小明有15个苹果，吃了3个，一共还剩下多少个苹果？", "商店运来20箱苹果，卖了8箱，一共还剩下多少个苹果？"),
        (
            "りんごが3個、みかんが5個。あわせていくつになりますか。",
            "花が8本、草が4本。あわせていくつになりますか。",
        ),
        ("แม่ค้าขายไข่ 30 ฟอง ฟองละ 4 บาท ได้เงินทั้งหมดกี่บาท", "พ่อซื้อดินสอ 12 แท่ง แท่งละ 5 บาท พ่อจ่ายเงินทั้งหมดกี่บาท"),
        (
            "Tom has 3 nuts. How many does he have in all?",
            "Ann has 7 pears. How many does he have in all?",
        ),
    ],
)
def test_phrases_of_many_questions_are_no_overlap(left: str, right: str) -> None:
    assert TestQuestions([left], 13).overlap(right) is None


def test_the_fingerprint_depends_on_the_questions_and_n() -> None:
    prints = {TestQuestions(texts, n).fingerprint for texts, n in ((["ab"], 2), (["a", "b"], 2), (["ab"], 3), ([], 2))}
    assert len(prints) == 4 and TestQuestions(["ab"], 2).fingerprint in prints
