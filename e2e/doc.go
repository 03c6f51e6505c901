// Package e2e owns the end-to-end tests: real binaries, laptops in network namespaces, a real Kubernetes.
package e2e
