"""Which character separates the columns of a CSV: programs of countries with a decimal comma write semicolons."""

import csv
from typing import TextIO

SEPARATORS = ",;\t"


def separator_of(file: TextIO) -> str:
    """The one of comma, semicolon and tab that divides the header of a CSV into most columns; else a comma.

    The header alone is asked, since texts below it hold all three. The file is at its beginning afterwards.

    Raises:
        csv.Error: a name in the header is longer than `csv.field_size_limit`.
        UnicodeDecodeError: the file is not in its encoding.
    """
    header = file.readline()
    file.seek(0)
    columns = {separator: len(next(csv.reader([header], delimiter=separator), [])) for separator in SEPARATORS}
    return max(SEPARATORS, key=columns.__getitem__)  # the first of equals
