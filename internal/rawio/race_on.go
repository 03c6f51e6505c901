//go:build race && linux

package rawio

const race = true
