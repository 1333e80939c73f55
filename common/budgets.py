"""Budgets as commands take them, times a factor, and as a fraction of an image's tokens."""

from ..budgets_uhr_bat import is_one_budget, share_in_order


def budgets(text: str, separator=",") -> list[int] | int:
    """[16, 24, 40, 66] from "16,24,40,66", one number for all scales from "146"."""
    numbers = [int(part) for part in text.split(separator)]
    return numbers if len(numbers) > 1 else numbers[0]


def counts_of_fraction(fraction, available, proportions=None) -> list[int]:
    """int[S], the tokens that each scale spends where a fraction of all tokens is wanted, at least one each; or int[1],
    those of all scales together, as many.

    Args:
        fraction: of all tokens, 0 to 1.
        available: int[S], tokens of every scale that show the image.
        proportions: of the scales; what a scale does not hold goes to the next finer ones. None: one budget for all.
    """
    total = max(round(fraction * sum(available)), len(available))
    return [total] if proportions is None else share_in_order(total, proportions, available, least=1)


def scale_budgets(budgets: list[int] | int, factor: float, least: int = 1) -> list[int] | int:
    """Budgets times a factor, at least `least` each; a scale that is left out (0) stays so."""
    if is_one_budget(budgets):
        return max(round(factor * budgets), least)
    return [max(round(factor * budget), least) if budget else 0 for budget in budgets]
