"""What checks the package's signatures while tests run: beartype, for which an int may stand where a float is asked."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
