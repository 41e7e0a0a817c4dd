"""Loaders: a record for each source of data that --dataset_name can name. One more source is one line of LOADERS."""


