{{- /*
The rules that hold for both kinds of objects. The dict has: root (the chart's context), resource (sessions) and one (session).

What the rules may rely on (checked by e2e/policy_test.go): in the validating phase of CREATE the server has already set name and
creationTimestamp and dropped status; deletecollection asks for each object on its own, with oldObject set; foreground
and orphan finalizers that a DELETE asks for are set by the server and are no UPDATE. has() is needed for every field of request that can be empty.
*/ -}}
{{- define "doppel.identity.variables" -}}
- name: sub
  expression: "has(request.subResource) ? request.subResource : ''"
- name: byManager
  expression: request.userInfo.username == '{{ include "doppel.managerUser" .root }}'
# Kubernetes' own controllers, by name: they finish deletions. The last but one is their common name on a cluster that runs
# them without accounts of their own; the last one rewrites objects unchanged after an upgrade of the storage version.
- name: byKubernetes
  expression: >-
    request.userInfo.username in [
    'system:serviceaccount:kube-system:generic-garbage-collector',
    'system:serviceaccount:kube-system:namespace-controller',
    'system:kube-controller-manager',
    'system:serviceaccount:kube-system:storage-version-migrator-controller']
- name: byCreator
  expression: >-
    (oldObject != null ? oldObject.spec.user : object.spec.user) == request.userInfo.username
{{- end }}

{{- define "doppel.identity.validations" -}}
# Who creates it is who it belongs to. This holds for the manager and for administrators as well.
- expression: request.operation != 'CREATE' || variables.byCreator
  messageExpression: >-
    "spec.user must be the name by which this cluster knows you, \"" + request.userInfo.username + "\""
  message: spec.user must be the name by which this cluster knows you
  reason: Forbidden
{{- if eq .resource "sessions" }}
# Nothing refers to an object by its name. A generated one makes that plain, and makes re-use of a name an accident. Intercepts may be
# declared by people, who name them.
- expression: >-
    request.operation != 'CREATE' ||
    (has(object.metadata.generateName) && object.metadata.generateName != '' && object.metadata.name.startsWith(object.metadata.generateName))
  message: the name must come from metadata.generateName
  reason: Forbidden
{{- end }}
# Status belongs to the manager, whatever RBAC says.
- expression: variables.sub == '' || (variables.sub == 'status' && variables.byManager)
  message: only the traffic-manager writes the status of {{ .resource }}
  reason: Forbidden
# Nobody else may touch it, not even without changing anything that matters: managedFields would be enough to spoil a renewal.
- expression: >-
    request.operation != 'UPDATE' || variables.byCreator || variables.byManager || variables.byKubernetes
  messageExpression: >-
    "this {{ .one }} belongs to \"" + oldObject.spec.user + "\" and only they may change it"
  message: this {{ .one }} belongs to somebody else and only they may change it
  reason: Forbidden
# The spec stays as it was created, for everybody. dyn() because the keys of a typed object cannot be listed.
- expression: >-
    request.operation != 'UPDATE' || (
    dyn(object.spec).all(k, {{ .mutable }}k in dyn(oldObject.spec) && dyn(object.spec)[k] == dyn(oldObject.spec)[k]) &&
    dyn(oldObject.spec).all(k, k in dyn(object.spec)))
  message: {{ .immutable }}
  reason: Forbidden
# Labels and annotations steer other programs (GitOps pruning, policies, backups). Whoever creates the object may set them; then they stay.
- expression: >-
    request.operation != 'UPDATE' || (
    (has(object.metadata.labels) ? object.metadata.labels : {}) == (has(oldObject.metadata.labels) ? oldObject.metadata.labels : {}) &&
    (has(object.metadata.annotations) ? object.metadata.annotations : {}) == (has(oldObject.metadata.annotations) ? oldObject.metadata.annotations : {}))
  message: the labels and annotations of {{ .resource }} cannot be changed
  reason: Forbidden
# A finalizer would keep a session or a namespace from going away, an owner would let the garbage collector delete for others.
- expression: >-
    request.operation != 'CREATE' || (
    (!has(object.metadata.finalizers) || size(object.metadata.finalizers) == 0) &&
    (!has(object.metadata.ownerReferences) || size(object.metadata.ownerReferences) == 0))
  message: {{ .resource }} cannot be created with finalizers or ownerReferences
  reason: Forbidden
- expression: >-
    request.operation != 'UPDATE' || variables.byManager || variables.byKubernetes || (
    (has(object.metadata.finalizers) ? object.metadata.finalizers : []) == (has(oldObject.metadata.finalizers) ? oldObject.metadata.finalizers : []) &&
    (has(object.metadata.ownerReferences) ? object.metadata.ownerReferences : []) == (has(oldObject.metadata.ownerReferences) ? oldObject.metadata.ownerReferences : []))
  message: the finalizers and ownerReferences of {{ .resource }} cannot be changed
  reason: Forbidden
- expression: >-
    request.operation != 'DELETE' || variables.byCreator || variables.byManager || variables.byKubernetes ||
    authorizer.group('doppel.dev').resource('{{ .resource }}').namespace(request.namespace).name(oldObject.metadata.name).check('revoke').allowed()
  messageExpression: >-
    "this {{ .one }} belongs to \"" + oldObject.spec.user + "\"; to delete it you need the right to revoke {{ .resource }}"
  message: this {{ .one }} belongs to somebody else; to delete it you need the right to revoke {{ .resource }}
  reason: Forbidden
{{- end }}

{{- define "doppel.identity.match" -}}
failurePolicy: Fail
matchConstraints:
  matchPolicy: Equivalent
  {{- if .root.Values.namespaces }}
  # Another manager's objects are none of our business. Its probe tries a forged intercept in the manager's own namespace.
  namespaceSelector:
    matchExpressions:
      - key: kubernetes.io/metadata.name
        operator: In
        values: {{ if eq .resource "sessions" }}{{ toJson (list .root.Release.Namespace) }}{{ else }}{{ toJson (append .root.Values.namespaces .root.Release.Namespace) }}{{ end }}
  {{- end }}
  resourceRules:
    - apiGroups: [doppel.dev]
      apiVersions: ["*"]
      operations: [CREATE, UPDATE, DELETE]
      resources: [{{ .resource }}, {{ .resource }}/*]
      scope: "*"
{{- end }}

{{- define "doppel.identity.binding" -}}
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata:
  name: doppel-identity-{{ .resource }}{{ include "doppel.suffix" .root }}
  labels:
    {{- include "doppel.labels" .root | nindent 4 }}
spec:
  policyName: doppel-identity-{{ .resource }}{{ include "doppel.suffix" .root }}
  validationActions: [Deny]
{{- end }}
