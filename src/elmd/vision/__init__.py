"""From clips to visual tokens: decoding, the frozen encoder, pooling (eq. 5-8), the store of features."""
