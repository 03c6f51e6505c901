package toolchain

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestVersionFollowsSources(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("go.mod", "module x\n")
	write("go.sum", "")
	write("main.go", "package main\n")
	p := Program{Name: "x", Module: "x", Sources: []string{"."}}
	version := func() string {
		v, err := p.version(dir)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	first := version()
	if version() != first {
		t.Error("the version changes by itself")
	}
	for file, content := range map[string]string{"go.mod": "module y\n", "go.sum": "a\n", "main.go": "package main // x\n"} {
		before := version()
		write(file, content)
		if version() == before {
			t.Errorf("the version does not follow %s", file)
		}
	}
	before := version()
	p.LDFlags = "-s"
	if version() == before {
		t.Error("the version does not follow the linker's flags")
	}
}

// The compiler is asked for in the module that it compiles: where the caller is, another one may be in force.
func TestVersionOfModulesCompiler(t *testing.T) {
	bin, module := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "go"), []byte("#!/bin/sh\npwd -P\necho $GOWORK\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	var versions []string
	for range 2 {
		t.Chdir(t.TempDir())
		t.Setenv("GOWORK", t.TempDir())
		v, err := (Program{Name: "x", Module: "."}).version(module)
		if err != nil {
			t.Fatal(err)
		}
		versions = append(versions, v)
	}
	if versions[0] != versions[1] {
		t.Error("the version depends on where the caller is")
	}
}

// TestPins checks that the version we name is the one that the module of the cluster's programs pins.
func TestPins(t *testing.T) {
	source, err := sourceDir()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(source, "kube", "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), "k8s.io/kubernetes "+Kubernetes+"\n") {
		t.Errorf("kube/go.mod does not pin Kubernetes %s", Kubernetes)
	}
}
