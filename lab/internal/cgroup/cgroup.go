// Package cgroup makes and removes a lab's control groups, in version 1, version 2 and the mixture of both.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const root = "/sys/fs/cgroup"

// Create makes the group, a relative path, in every hierarchy.
func Create(group string) error {
	hierarchies, err := mounted()
	if err != nil {
		return err
	}
	for _, h := range hierarchies {
		dir := h
		for elem := range strings.SplitSeq(group, "/") {
			parent := dir
			dir = filepath.Join(dir, elem)
			if err := makeChild(parent, dir); err != nil {
				return fmt.Errorf("make control group %s: %w", dir, err)
			}
		}
	}
	return nil
}

func makeChild(parent, dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	// cgroups(7): a new cpuset is empty and takes no process until it has both.
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		value, err := os.ReadFile(filepath.Join(parent, file))
		if err != nil || isV2(parent) {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, file), value, 0); err != nil {
			return err
		}
	}
	return delegate(parent)
}

// delegate lets the children of a version 2 group use all controllers it has itself.
func delegate(parent string) error {
	if !isV2(parent) {
		return nil
	}
	controllers, err := os.ReadFile(filepath.Join(parent, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for c := range strings.FieldsSeq(string(controllers)) {
		err := os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+"+c), 0)
		if err != nil {
			return fmt.Errorf("delegate controller %s: %w", c, err)
		}
	}
	return nil
}

// Remove removes the group and all below it from every hierarchy, as soon as the processes in it are gone.
func Remove(group string, patience time.Duration) error {
	hierarchies, err := mounted()
	if err != nil {
		return err
	}
	deadline := time.Now().Add(patience)
	for _, h := range hierarchies {
		for {
			err := removeTree(filepath.Join(h, group))
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
				return fmt.Errorf("remove control group: %w", err)
			}
			time.Sleep(10 * time.Millisecond) // the kernel has no event for "last process gone" that version 1 shares
		}
	}
	return nil
}

func removeTree(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, d := range slices.Backward(dirs) {
		if err := unix.Rmdir(d); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("%s: %w", d, err)
		}
	}
	return nil
}

// mounted lists the hierarchies: the root itself with version 2, its directories otherwise.
func mounted() ([]string, error) {
	if isV2(root) {
		return []string{root}, nil
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, fmt.Errorf("control groups: %w", err)
	}
	var dirs []string
	for _, e := range entries {
		dir := filepath.Join(root, e.Name())
		// Not the symbolic links, which name the same hierarchies again.
		if e.IsDir() && (magic(dir) == unix.CGROUP_SUPER_MAGIC || isV2(dir)) {
			dirs = append(dirs, dir)
		}
	}
	return dirs, nil
}

func isV2(dir string) bool { return magic(dir) == unix.CGROUP2_SUPER_MAGIC }

func magic(dir string) int64 {
	var s unix.Statfs_t
	if unix.Statfs(dir, &s) != nil {
		return 0
	}
	return int64(s.Type)
}
