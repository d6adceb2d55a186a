"""Tables: readable, and safe to print whatever a model writes."""

from lmppo.tables import print_completions, print_metrics


def test_control_characters_and_markup_are_shown_not_obeyed(capsys):
    print_completions("T", ["[bold]p[/bold]"], ["\x1b[31mred\x07 [red]x[/red]"], {"score": [1.23456]}, rows=5)
    output = capsys.readouterr().out
    assert "\x1b[31m" not in output and "\x07" not in output
    assert "x1b" in output and "[red]x[/red]" in output and "[bold]p[/bold]" in output
    assert "1.23" in output and "1.234" not in output


def test_messages_and_columns_of_text(capsys):
    prompts = [[{"role": "user", "content": "hello"}, {"role": "user", "content": "there"}]] * 3
    print_completions("T", prompts, ["a", "b", "c"], {"note": ["n0", "n1", "n2"]}, rows=2)
    output = capsys.readouterr().out
    assert "hello there" in output and "n1" in output and "n2" not in output


def test_metrics_side_by_side(capsys):
    print_metrics("M", {"before": {"reward": 0.123456}, "after": {"reward": 4.0}})
    output = capsys.readouterr().out
    assert "0.1235" in output and "4" in output and "reward" in output


def test_a_metric_that_only_one_side_has(capsys):
    """A reward function that applied to no completion logs nothing."""
    print_metrics("M", {"before": {"reward": 1.0, "x": 2.0}, "after": {"reward": 4.0, "y": 3.0}})
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row[1:4]] for row in rows] == [
        ["reward", "1", "4"],
        ["x", "2", "nan"],
        ["y", "nan", "3"],
    ]
