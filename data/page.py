def columns(header, rows):
    table = [header, *rows]
    widths = [max(len("" if row[i] is None else str(row[i])) for row in table) for i in range(len(header))]
    return "\n".join("  ".join(("" if c is None else str(c)).ljust(w) if i == 0 else ("" if c is None else str(c)).rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip() for row in table)
