"""The campaign's table: one per area, one line for what went in, with what became of its cases."""

from bench.reliability.table import BEGIN, END, put, table


def test_a_line_tells_how_many_cases_came_to_what():
    tallies = {
        "Solves": {"random": {"right": 1200, "NaN": 34}, "zero": {"refused": 5}},
        "Faults": {"disk full": {"old file whole": 1}},
    }
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(tallies).splitlines()]
    assert cells[0] == ["Solves", "cases", "what happened"]
    assert cells[2] == ["random", "1,234", "1,200 right; 34 NaN"]
    assert cells[3] == ["zero", "5", "refused"]
    assert cells[5][0] == "Faults"
    assert cells[7] == ["disk full", "1", "old file whole"]


def test_the_page_keeps_what_is_around_the_table():
    page = f"before\n{BEGIN}old\n{END}after\n"
    assert put(page, "new\n") == f"before\n{BEGIN}new\n{END}after\n"
