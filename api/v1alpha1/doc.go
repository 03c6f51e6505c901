// Package v1alpha1 owns the Go types of doppel's custom resources (group doppel.dev, version v1alpha1): Session and Intercept.
//
// +kubebuilder:object:generate=true
// +groupName=doppel.dev
package v1alpha1
