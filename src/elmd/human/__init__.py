"""Human evaluation (§4.4, Table 4): blind rating pages drawn from finished runs, and what the raters' files say."""
