from polyscale.utils.text import no_markup, no_math


def test_a_class_is_no_markup_in_a_model_card():
    assert no_markup("golden_retriever") == "golden_retriever"
    assert no_markup("[a](b)\n# <b>`c`|d\x1b") == r"\[a\](b) # \<b\>\`c\`\|d "


def test_half_characters_and_formulas_are_no_matter_to_a_plot():
    assert no_math("$a$\udce9\n") == "\\$a\\$\N{REPLACEMENT CHARACTER}\n"
