{{/* Call with (dict "root" $ "component" "control"). */}}
{{- define "signet.selector" -}}
app.kubernetes.io/name: signet-{{ .component }}
app.kubernetes.io/part-of: signet
{{- end -}}

{{- define "signet.labels" -}}
{{ include "signet.selector" . }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/version: {{ .root.Values.image.tag | default .root.Chart.AppVersion | quote }}
{{- end -}}

{{/* An image by its digest where there is one, else by its tag. Call with
(dict "root" $ "component" "control"). */}}
{{- define "signet.image" -}}
{{- $of := index .root.Values .component -}}
{{- $name := printf "%s/signet-%s" .root.Values.image.registry .component -}}
{{- if $of.digest -}}
{{ printf "%s@%s" $name $of.digest }}
{{- else -}}
{{ printf "%s:%s" $name (.root.Values.image.tag | default .root.Chart.AppVersion) }}
{{- end -}}
{{- end -}}

{{/* Environment that every program has. */}}
{{- define "signet.env" -}}
- name: NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- end -}}

{{/* The driver of volumes, by the name that pods write. */}}
{{- define "signet.csiDriver" -}}csi.signet.dev{{- end -}}
