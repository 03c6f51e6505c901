// Package doppel holds the files of the Helm chart, so that programs can install it without fetching anything.
package doppel

import "embed"

// Files are the chart's files as they stand in this directory. all: because go:embed skips names that begin with "_".
//
//go:embed Chart.yaml values.yaml values.schema.json all:templates crds
var Files embed.FS
