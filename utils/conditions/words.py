"""The syntax of conditions on a command line: values by name, and columns of data by kind."""

from collections.abc import Collection, Mapping, Sequence

from utils.base.messages import UserError


def parse_rows(text: str, fields: Sequence[str], elsewhere: Collection[str] = ()) -> list[dict[str, str]]:
    """Returns the texts of `angle=0.3,mass=2; angle=1,mass=2`, {field: value} for each condition between semicolons.

    Values that hold a comma or a semicolon stand in double quotes; `elsewhere` are fields that another flag gives.
    Raises UserError unless each row gives each field once.
    """
    rows = []
    for part in split_parts(text, ";"):
        row = {}
        for pair in split_parts(part, ","):
            name, equals, value = (word.strip() for word in pair.partition("="))
            if not equals or not value:
                quotes = ""
                if row:
                    last = next(reversed(row))
                    quotes = f'; a value with a comma stands in quotes, {last}="{row[last]},{pair}"'
                known = ", ".join(fields)
                raise UserError(f"{pair.strip()!r} is not of the form NAME=VALUE; names are {known}{quotes}")
            if name in elsewhere:
                raise UserError(f"{name} is what the flag gives itself; leave it out of --condition")
            if name not in fields:
                raise UserError(f"{name!r} is no part of the run's condition; give {', '.join(fields)}")
            if name in row:
                raise UserError(f"{name} is given twice; separate conditions by ;")
            row[name] = unquote(value)
        if missing := [name for name in fields if name not in row]:
            raise UserError(
                f"{part.strip()!r} lacks {', '.join(missing)}; give a value for each of {', '.join(fields)}"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"it gives no condition; write {', '.join(f'{name}=...' for name in fields)}")
    return rows


def write_rows(rows: Sequence[Mapping[str, str]]) -> str | None:
    """Returns the text from which `parse_rows` reads these conditions; None where there is none, as of a value with
    quotes."""
    text = "; ".join(",".join(f"{name}={_quote(value)}" for name, value in row.items()) for row in rows)
    try:
        is_read = parse_rows(text, list(rows[0])) == [dict(row) for row in rows]
    except UserError:
        is_read = False
    return text if is_read else None


def write_texts(texts: Sequence[str]) -> str | None:
    """Returns texts between semicolons, as --prompt takes them; None where they cannot be written so."""
    text = "; ".join(map(_quote, texts))
    return text if [unquote(part) for part in split_parts(text, ";")] == list(texts) else None


def _quote(text: str) -> str:
    # Quotes only where they are needed: as a user would write it.
    return f'"{text}"' if set(text) & set(",;") or text != text.strip() else text


def split_parts(text: str, mark: str) -> list[str]:
    """Returns the parts of a text between marks that stand outside of double quotes, without empty ones."""
    parts = [""]
    is_quoted = False
    for letter in text:
        is_quoted ^= letter == '"'
        if letter == mark and not is_quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def unquote(text: str) -> str:
    """Returns a text without spaces around it, and without double quotes if it stands in them."""
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def read_kinds(text: str) -> dict[str, tuple[str, ...]]:
    """Returns {kind: columns} of a value of --condition_columns: {"vector": ("a", "b"), "class": ("c",)} of
    `vector:a,b+class:c`. Raises UserError for kinds or columns given twice."""
    flag = f"--condition_columns={text}"
    kinds: dict[str, tuple[str, ...]] = {}
    for part in text.split("+"):
        kind, colon, names = part.strip().partition(":")
        columns = tuple(name.strip() for name in names.split(",")) if colon else ()
        if not kind:
            raise UserError(f"{flag}: name kinds, joined by +, such as class+vector:angle,mass")
        if kind in kinds:
            raise UserError(f"{flag}: {kind} is given twice; join its columns by commas")
        if not all(columns) or len(set(columns)) < len(columns):
            raise UserError(f"{flag}: {part.strip()!r} needs the name of a column after the colon, each name once")
        kinds[kind] = columns
    return kinds
