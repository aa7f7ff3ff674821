"""From a data set's file to padded batches: read, formats, examples, split, batches; `load` is the whole way."""
