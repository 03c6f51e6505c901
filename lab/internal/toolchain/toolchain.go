// Package toolchain builds the programs that run inside a lab, once for each version of their sources.
package toolchain

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Kubernetes is the version of the cluster; kube/go.mod pins the same.
const Kubernetes = "v1.34.4"

// Program is a program that the lab builds.
type Program struct {
	Name string
	// Module is the directory of its Go module, below the lab's, and Package the package in it.
	Module, Package string
	// Sources are the directories below Module that the hash covers, besides go.mod and go.sum.
	Sources []string
	LDFlags string
}

// Kube, CoreDNS and Pause are the programs of a lab.
func Kube() Program {
	const version = "k8s.io/component-base/version."
	return Program{
		Name: "kube", Module: "kube", Package: "./cmd/kube", Sources: []string{"cmd/kube"},
		LDFlags: "-s -w -X " + version + "gitVersion=" + Kubernetes + " -X " + version + "gitMajor=1 -X " + version + "gitMinor=34",
	}
}

// CoreDNS is the cluster's DNS server.
func CoreDNS() Program {
	return Program{Name: "coredns", Module: "coredns", Package: ".", Sources: []string{"."}, LDFlags: "-s -w"}
}

// Pause holds the namespaces of a pod. It imports the standard library only.
func Pause() Program {
	return Program{Name: "pause", Module: ".", Package: "./cmd/pause", Sources: []string{"cmd/pause"}, LDFlags: "-s -w"}
}

// Built is a program in the cache.
type Built struct {
	Path string
	// Version is a hash of all that went into the program.
	Version string
}

// CacheDir is where built programs and snapshots are kept.
func CacheDir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no cache directory: %w", err)
	}
	return filepath.Join(dir, "doppel-lab"), nil
}

// Build returns the program from the cache, and builds it first if it is missing; building says so.
func Build(ctx context.Context, p Program, building func()) (Built, error) {
	source, err := sourceDir()
	if err != nil {
		return Built{}, err
	}
	module := filepath.Join(source, p.Module)
	version, err := p.version(module)
	if err != nil {
		return Built{}, fmt.Errorf("sources of %s: %w", p.Name, err)
	}
	cache, err := CacheDir()
	if err != nil {
		return Built{}, err
	}
	built := Built{Path: filepath.Join(cache, "bin", p.Name+"-"+version), Version: version}
	if _, err := os.Stat(built.Path); err == nil {
		return built, nil
	}
	if err := os.MkdirAll(filepath.Dir(built.Path), 0o755); err != nil {
		return Built{}, err
	}
	unlock, err := lock(built.Path + ".lock")
	if err != nil {
		return Built{}, err
	}
	defer unlock()
	if _, err := os.Stat(built.Path); err == nil {
		return built, nil // another lab has built it meanwhile
	}
	building()
	return built, p.compile(ctx, module, built.Path)
}

func (p Program) compile(ctx context.Context, module, to string) error {
	goTool, err := findGo()
	if err != nil {
		return err
	}
	tmp := to + ".tmp"
	cmd := exec.CommandContext(ctx, goTool, "build", "-trimpath", "-buildvcs=false", "-ldflags", p.LDFlags, "-o", tmp, p.Package)
	inModule(cmd, module)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", p.Name, err, bytes.TrimSpace(out))
	}
	if err := os.Rename(tmp, to); err != nil {
		return err
	}
	return removeOld(filepath.Dir(to), p.Name+"-", to)
}

// inModule has the go command look at one module only: that decides which compiler it takes, wherever the caller is.
func inModule(cmd *exec.Cmd, module string) {
	cmd.Dir = module
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=-mod=readonly")
}

// findGo finds the go command, also where sudo has taken its directory out of PATH.
func findGo() (string, error) {
	path, err := exec.LookPath("go")
	if err == nil {
		return path, nil
	}
	for _, path := range []string{"/usr/local/go/bin/go", "/usr/lib/go/bin/go", "/snap/bin/go"} {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("a Go toolchain is needed to build the cluster's programs: %w", err)
}

// removeOld removes other versions that nobody has used for a month.
func removeOld(dir, prefix, keep string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		info, err := e.Info()
		if err != nil || !strings.HasPrefix(e.Name(), prefix) || strings.HasPrefix(path, keep) {
			continue
		}
		if time.Since(info.ModTime()) > 30*24*time.Hour {
			err = errors.Join(err, os.Remove(path))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// version hashes what decides the program: its module's pins, its sources, its flags and the compiler.
func (p Program) version(module string) (string, error) {
	h := sha256.New()
	goTool, err := findGo()
	if err != nil {
		return "", err
	}
	cmd := exec.Command(goTool, "env", "GOVERSION")
	inModule(cmd, module)
	goVersion, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("version of Go: %w", err)
	}
	fmt.Fprintln(h, runtime.GOARCH, strings.TrimSpace(string(goVersion)), p.LDFlags)
	var files []string
	if p.Module != "." {
		files = append(files, filepath.Join(module, "go.mod"), filepath.Join(module, "go.sum"))
	}
	for _, dir := range p.Sources {
		matches, err := filepath.Glob(filepath.Join(module, dir, "*.go"))
		if err != nil {
			return "", err
		}
		files = append(files, matches...)
	}
	slices.Sort(files)
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(h, filepath.Base(f), len(b))
		h.Write(b)
	}
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}

// sourceDir finds the lab's sources: beside the program (bin/lab and lab/), or above the working directory.
func sourceDir() (string, error) {
	var starts []string
	if exe, err := os.Executable(); err == nil {
		starts = append(starts, filepath.Dir(exe))
	}
	if wd, err := os.Getwd(); err == nil {
		starts = append(starts, wd)
	}
	for _, start := range starts {
		for dir := start; ; dir = filepath.Dir(dir) {
			for _, candidate := range []string{dir, filepath.Join(dir, "lab")} {
				if _, err := os.Stat(filepath.Join(candidate, "kube", "cmd", "kube", "main.go")); err == nil {
					return candidate, nil
				}
			}
			if dir == filepath.Dir(dir) {
				break
			}
		}
	}
	return "", fmt.Errorf("the lab's sources are neither above the program nor above the working directory: %w", fs.ErrNotExist)
}

func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}
