// Package docstest owns the tests of the documentation: what it says of flags, time-outs, log keys, rights and files is compared with the code.
package docstest
