// Package archtest owns the rules of the layout: which package may import which, what no binary may link, and what each package and main must look like.
//
// The rules are data in rules_test.go; docs/architecture.md shows the same picture. A new package is added to its layer there, a
// new edge inside a layer to sideways, each exception with its reason.
package archtest
