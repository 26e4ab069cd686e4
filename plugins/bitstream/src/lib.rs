//! Gearbox codecs `huffman` and `arithmetic`: static order-0 entropy coding of symbol streams.
