package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
)

// allocs compares what benchmarks allocate with what is committed, both as go test prints them. What happens on other goroutines counts too,
// so a figure is the least of its runs, and a tenth and one more is allowed.
func allocs(_ context.Context, args []string) error {
	if len(args) != 2 {
		return errors.New("want COMMITTED MEASURED")
	}
	want, err := readAllocs(args[0])
	if err != nil {
		return err
	}
	got, err := readAllocs(args[1])
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(want)) {
		n, ok := got[name]
		switch {
		case !ok:
			errs = append(errs, fmt.Errorf("%s did not run", name))
		case n > want[name]+want[name]/10+1:
			errs = append(errs, fmt.Errorf("%s: %d allocations an operation, %s says %d", name, n, args[0], want[name]))
		default:
			fmt.Printf("%-40s %5d allocs/op, at most %d\n", name, n, want[name]+want[name]/10+1)
		}
	}
	return errors.Join(errs...)
}

func readAllocs(file string) (map[string]int, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	out := map[string]int{}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 3 || !strings.HasPrefix(f[0], "Benchmark") || f[len(f)-1] != "allocs/op" {
			continue
		}
		n, err := strconv.Atoi(f[len(f)-2])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		name := f[0]
		if i := strings.LastIndexByte(name, '-'); i > 0 { // the number of cores
			name = name[:i]
		}
		if old, ok := out[name]; !ok || n < old {
			out[name] = n
		}
	}
	return out, nil
}
